# make reproduce   run every notebook at the demo scale; SCALE=lfw and ARGS="--only 01,05" choose others
# make test        the tests; ARGS="-k losses" chooses some
# make lab         JupyterLab on the notebooks
# make figures     the figures and tables in figures/, from what make reproduce recorded
# make lint        style and types
# make mutants     faults planted one at a time in losses, training and evaluation: which do the tests notice?
#                  Some minutes; writes docs/mutants.md. ARGS=--again tries those again that were not
# Each prepares $(VENV) first: minutes and gigabytes the first time, about a second afterwards.

VENV ?= .venv
SCALE ?= demo
ARGS ?=
# PYTHON=python3.12 chooses the interpreter that $(VENV) is made with; PIP_ARGS is passed to pip, for example to
# name an index with the small torch without CUDA.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10 python
PIP_ARGS ?=

RUN := $(VENV)/bin/python
# Named after the folder, since an environment does not survive being moved.
STAMP := $(VENV)/.ready-$(shell printf %s "$(CURDIR)" | cksum | cut -d ' ' -f 1)

.PHONY: reproduce test lab figures lint mutants setup clean
.DEFAULT_GOAL := reproduce

reproduce: $(STAMP)
	@$(RUN) -m btnet_tools reproduce --scale $(SCALE) $(ARGS)

# A process for each core, each with one thread.
test: $(STAMP)
	@$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

lab: $(STAMP)
	@$(RUN) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks $(ARGS)

figures: $(STAMP)
	@$(RUN) -m btnet_tools figures $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) scripts/mutants.py $(ARGS)

setup: $(STAMP)

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@found=; for python in $(PYTHON); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Python 3.10 or newer is needed; none of these is: $(PYTHON). Name one: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! $$found -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$found has no venv module. On Debian or Ubuntu: apt-get install python3-venv; or: make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	echo "Preparing $(VENV) with $$($$found --version): some minutes, about 6 GB with CUDA ..."; \
	$$found -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[tools,paper,test,dev]'
	@rm -f $(VENV)/.ready-*; touch $@
