# Both commands in a container, on a CPU:
#   docker build -t btnet . && docker run --rm -v "$PWD/runs:/btnet/runs" btnet
#   docker run --rm btnet make test
# Real faces: add -v /your/data:/data -e BTNET_DATA=/data and `make reproduce SCALE=lfw`.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /btnet
COPY . .
# The small PyTorch without CUDA; --build-arg PIP_ARGS= takes the one with it.
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN make setup PYTHON=python3 PIP_ARGS="$PIP_ARGS"
CMD ["make", "reproduce"]
