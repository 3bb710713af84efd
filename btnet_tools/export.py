"""A BTNet for other programs: ONNX with all routes in one file, or torch.export's pt2, a file each.

Input ``pixels``: RGB ``(B, 3, r, r')`` float32 in [0, 255], B free. Output ``embedding`` ``(B, D)``
of unit length and ``norm`` ``(B,)``, its length before. The ONNX file chooses the route by the rows
of its input and holds each weight of the shared trunk once.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btnet_core.errors import ConfigError
from btnet_core.files import write_atomically
from btnet_core.models.btnet import BTNet

try:
    import onnx
    from onnx import TensorProto, compose, helper
    from onnxscript import optimizer
except ImportError:  # told where ONNX is asked for
    onnx = None  # type: ignore[assignment]

OUTPUTS = ("embedding", "norm")


class PixelRoute(nn.Module):
    """One route with the normalisation before it and the unit length after it."""

    def __init__(self, btnet: BTNet, r: int) -> None:
        super().__init__()
        config = btnet.trunk.config
        self.route, self.normalise = btnet.route(r), btnet.trunk.normalise
        self.size = getattr(self.route, "size", config.size)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.route(self.normalise(pixels))
        return nn.functional.normalize(z), torch.linalg.vector_norm(z, dim=1)


def export(btnet: BTNet, kind: str, folder: Path | str) -> list[Path]:
    """Write ``folder/btnet.onnx`` with all routes, or ``folder/btnet_<r>.pt2`` for each.

    Raises:
        ConfigError: an unknown kind, or a package that ONNX needs is missing.
        WriteError: ``folder`` cannot be written.
    """
    if kind not in ("onnx", "pt2"):
        raise ConfigError(f"format: got {kind!r}, expected onnx or pt2")
    if kind == "onnx" and onnx is None:
        raise ConfigError("--format onnx needs onnx, onnxscript: pip install 'btnet-core[tools]'")
    btnet, folder = btnet.cpu().eval(), Path(folder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        programs = {r: program(PixelRoute(btnet, r)) for r in btnet.resolutions}
        content: dict[str, Any] = {f"btnet_{r}.pt2": one for r, one in programs.items()}
        if kind == "onnx":
            routes = {r: onnx_route(one) for r, one in programs.items()}
            content = {"btnet.onnx": onnx_switch(routes)}
    for name, model in content.items():
        write_atomically(folder / name, serialised(model))
    return [folder / name for name in content]


def serialised(model: Any) -> bytes:
    """The bytes of an ONNX model, checked, or of an exported program."""
    if isinstance(model, torch.export.ExportedProgram):
        file = io.BytesIO()
        torch.export.save(model, file)
        return file.getvalue()
    onnx.checker.check_model(model)
    return model.SerializeToString()


def program(route: PixelRoute) -> torch.export.ExportedProgram:
    """``route`` as torch.export sees it, for any batch."""
    faces = torch.full((2, 3, *route.size), 128.0)
    return torch.export.export(route, (faces,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def onnx_route(one: torch.export.ExportedProgram) -> Any:
    """One route; its batch norms stay apart from convolutions, which routes share."""
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": OUTPUTS}
    made: Any = torch.onnx.export(one, dynamo=True, optimize=False, verbose=False, **names)
    optimizer.fold_constants(made.model)
    optimizer.remove_unused_nodes(made.model)
    return made.model_proto


# ---- all routes in one file: branches of nested Ifs, their weights initializers of the whole ----


def onnx_switch(models: Mapping[int, Any]) -> Any:
    """One model that runs the route whose rows its input has; the largest where none fits."""
    weights: dict[Any, Any] = {}
    graphs = {r: inner_graph(r, model, weights) for r, model in models.items()}
    *lower, last = sorted(graphs)
    body, nodes = graphs[last], [helper.make_node("Shape", ["pixels"], ["rows"], start=2, end=3)]
    for r in reversed(lower):
        weights[r] = helper.make_tensor(f"row{r}", TensorProto.INT64, [1], [r])
        nodes.append(helper.make_node("Equal", ["rows", f"row{r}"], [f"is{r}"]))
        outputs = [floats(f"from{r}/{name}", None) for name in OUTPUTS]
        branches = {"then_branch": graphs[r], "else_branch": body}
        choice = helper.make_node("If", [f"is{r}"], [one.name for one in outputs], **branches)
        body = helper.make_graph([choice], f"up_to_{r}", [], outputs)
    nodes += body.node
    for inner, name in zip(body.output, OUTPUTS, strict=True):
        nodes.append(helper.make_node("Identity", [inner.name], [name]))
    model = models[last]
    length = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    outputs = [floats("embedding", ["batch", length]), floats("norm", ["batch"])]
    pixels = floats("pixels", ["batch", 3, "rows", "columns"])
    graph = helper.make_graph(nodes, "btnet", [pixels], outputs, list(weights.values()))
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def inner_graph(r: int, model: Any, weights: dict[Any, Any]) -> Any:
    """The graph of a route; its weights join ``weights`` unless equal ones are there."""
    graph, kept = compose.add_prefix(model, f"r{r}/").graph, {f"r{r}/pixels": "pixels"}
    for one in graph.initializer:
        digest = hashlib.sha256(one.raw_data or one.SerializeToString()).digest()
        key = (one.data_type, tuple(one.dims), digest)
        kept[one.name] = weights.setdefault(key, one).name
    for node in graph.node:
        node.input[:] = [kept.get(name, name) for name in node.input]
    return helper.make_graph(graph.node, f"route_{r}", [], graph.output)


def floats(name: str, shape: Sequence[int | str] | None) -> Any:
    """The description of a float32 value of ``shape``."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
