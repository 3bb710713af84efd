"""Quick inference on a CPU: ``OpenVinoBTNet(BTNet.load("my_btnet"), "bf16").embed(images)``."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.device import fast_bf16
from btnet_core.errors import ConfigError
from btnet_core.images import resize, to_pixels
from btnet_core.models.btnet import BTNet

openvino = nncf = None
# Both report their use to their makers where this package can be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
with suppress(ImportError):
    import openvino
with suppress(ImportError):
    import nncf

PRECISIONS = ("fp32", "bf16", "int8")
BATCHES = (32, 8, 1)  # fixed shapes run up to twice as fast as free ones: x is cut into these
LOWEST_COSINE = 0.99  # of int8 to fp32, mean over the faces


@cache
def _core() -> Any:
    """The one OpenVINO of the process, never released.

    Its CPU plugin gives the main thread a stack for signals and unmaps it when it goes: the next
    signal, such as Ctrl-C or a worker's end, would then be a segmentation fault.
    """
    return openvino.Core()


class OpenVinoBTNet(BTNet):
    """``btnet`` (on the CPU) in ``precision``: every route, any batch; its weights are copied.

    Args:
        faces: for int8, which needs nncf: faces of full size that set the ranges, 64 say.

    Raises:
        ConfigError: a package is missing, the processor has no bf16, there are no faces for int8,
            or int8 does not pay here: slower than bf16, or embeddings too far from fp32's.
    """

    def __init__(self, btnet: BTNet, precision: str, faces: Sequence = ()) -> None:
        nn.Module.__init__(self)
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: got {precision!r}, expected {', '.join(PRECISIONS)}")
        if openvino is None or (precision == "int8" and nncf is None):
            raise ConfigError(f"precision {precision} needs pip install 'btnet-core[tools,int8]'")
        has_bf16 = fast_bf16(torch.device("cpu"))
        if precision == "bf16" and not has_bf16:
            raise ConfigError("precision bf16: this processor has no AVX512-BF16 or AMX; use fp32")
        self.trunk, self.routes = btnet.trunk, btnet.routes
        self.inference = f"OpenVINO {precision}"
        self.hint = "bf16" if has_bf16 and precision != "fp32" else "f32"
        self.models: dict[int, Any] = {}
        self.requests: dict[tuple[int, int], Any] = {}
        self.eval()
        if precision == "int8":
            if not len(faces):
                raise ConfigError("precision int8: got no faces to set the ranges by (--calibrate)")
            for r in self.resolutions:
                pixels = [to_pixels(face, f"faces[{i}]") for i, face in enumerate(faces)]
                small = [resize(self.trunk.crop(face), self.input_size(r)) for face in pixels]
                self._quantise(r, self.trunk.normalise(torch.stack(small)))

    @torch.inference_mode()
    def forward(self, x: Tensor, r: int) -> Tensor:
        """As BTNet's: normalised faces ``(B, 3, r, r')`` -> embeddings ``(B, D)``, float32."""
        parts = [torch.empty(0, self.trunk.config.embedding)]
        while len(x):
            size = next(size for size in BATCHES if size <= len(x))
            if r not in self.models:
                self.models[r] = self._converted(r)
            if (r, size) not in self.requests:
                self.requests[r, size] = self._compiled(self.models[r], size)
            values = self.requests[r, size].infer({0: x[:size].float().contiguous().numpy()})[0]
            parts.append(torch.from_numpy(values.copy()))
            x = x[size:]
        return torch.cat(parts)

    def _converted(self, r: int) -> Any:
        """The route as an OpenVINO model of any batch."""
        shape = (3, *self.input_size(r))
        with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):  # of an embedder
            warnings.simplefilter("ignore")  # of tracing
            route = nn.Sequential(*self.route(r).parts()).eval()
            traced = torch.jit.trace(route, torch.zeros(2, *shape), check_trace=False)
            return openvino.convert_model(traced, input=openvino.PartialShape([-1, *shape]))

    def _compiled(self, model: Any, batch: int) -> Any:
        fixed = model.clone()
        fixed.reshape([batch, *list(model.input(0).partial_shape)[1:]])
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
        how = {"INFERENCE_PRECISION_HINT": self.hint, "PERFORMANCE_HINT": "LATENCY", **threads}
        return _core().compile_model(fixed, "CPU", how).create_infer_request()

    def _quantise(self, r: int, x: Tensor) -> None:
        """int8 for the route of r, by faces ``(B, 3, r, r')``; ConfigError if it does not pay."""
        logging.getLogger("nncf").setLevel(logging.ERROR)
        whole = self._converted(r)
        # the first convolution, depthwise ones and fully connected layers lose much, save little
        first = next(op for op in whole.get_ordered_ops() if op.get_type_name() == "Convolution")
        kept = {"names": [first.get_friendly_name()], "types": ["GroupConvolution", "MatMul"]}
        how = {"ignored_scope": nncf.IgnoredScope(**kept, validate=False), "subset_size": len(x)}
        how["preset"] = nncf.QuantizationPreset.MIXED
        self.models[r] = nncf.quantize(whole, nncf.Dataset(x.split(1), Tensor.numpy), **how)
        with torch.inference_mode():
            cosine = float(F.cosine_similarity(self(x, r), self.route(r)(x)).mean())
        ms = self._milliseconds({"int8": self.models[r], self.hint: whole}, x[:8])
        if cosine < LOWEST_COSINE or ms["int8"] > ms[self.hint]:
            told = (
                f"cosine {cosine:.4f} to fp32, int8 {ms['int8']:.2f} ms, else {ms[self.hint]:.2f}"
            )
            raise ConfigError(f"precision int8 does not pay on this processor: {r} px {told}")

    def _milliseconds(self, models: dict[str, Any], x: Tensor) -> dict[str, float]:
        """Of x through each model, medians of rounds that take turns."""
        requests = {name: self._compiled(model, len(x)) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(15):
            for name, request in requests.items():
                start = time.perf_counter()
                request.infer({0: x.numpy()})
                times[name].append(1e3 * (time.perf_counter() - start))
        return {name: median(values) for name, values in times.items()}
