"""A BTNet for other programs: ONNX, TorchScript or torch.export's pt2; one route a file, or all in one.

Input ``pixels``: RGB ``(B, 3, r, r')`` float32 in [0, 255], B free; a file with all routes chooses by the rows. Output
``embedding`` ``(B, D)`` of unit length and ``norm`` ``(B,)``, its length before. All routes' files keep each weight
of the shared trunk once.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btnet_core.errors import ConfigError, DataError
from btnet_core.files import write_atomically
from btnet_core.images import scaled_size
from btnet_core.models.btnet import BTNet

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2"}
OUTPUTS = ("embedding", "norm")


class PixelRoute(nn.Module):
    """One route with the normalisation before it and the unit length after it."""

    def __init__(self, net: BTNet, r: int) -> None:
        super().__init__()
        self.route, self.mean, self.std = net.route(r), net.trunk.config.mean, net.trunk.config.std

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.route((pixels - self.mean) / self.std)
        return nn.functional.normalize(z), torch.linalg.vector_norm(z, dim=1)


def export(
    net: BTNet, kind: str, folder: Path | str, resolutions: Sequence[int] = ()
) -> list[Path]:
    """Write ``folder/btnet_<r>.<suffix>`` for each of ``resolutions``, or with none ``folder/btnet.<suffix>`` for all.

    Raises:
        ConfigError: an unknown format or resolution, or a package that the format needs is missing.
        DataError: ``folder`` cannot be written.
    """
    if kind not in SUFFIXES:
        raise ConfigError(f"format: got {kind!r}, expected one of {', '.join(SUFFIXES)}")
    net, folder = net.cpu().eval(), Path(folder)
    chosen = {r: PixelRoute(net, r) for r in resolutions or net.resolutions}
    groups = {f"btnet_{r}": {r: chosen[r]} for r in chosen} if resolutions else {"btnet": chosen}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, routes in groups.items():
            written.append(folder / f"{name}{SUFFIXES[kind]}")
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of tracing, and that TorchScript will end some day
                content = WRITERS[kind](routes, {r: _faces(net, r) for r in routes})
            write_atomically(written[-1], content)
    except OSError as error:
        raise DataError(f"--out {folder}: cannot be written ({error.strerror or error})") from error
    except ImportError as error:
        raise ConfigError(
            f"--format {kind} needs {error.name}: pip install 'btnet-core[export]'"
        ) from error
    return written


def _faces(net: BTNet, r: int) -> Tensor:
    return torch.full((2, 3, *scaled_size(r, net.trunk.config.size)), 128.0)


# ---- TorchScript: tensors that are one object are stored once ----


class _Switch(nn.Module):
    def __init__(self, routes: dict[int, nn.Module]) -> None:
        super().__init__()
        self.rows, self.routes = list(routes), nn.ModuleList(routes.values())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found, embedding, norm = False, pixels, pixels
        for index, route in enumerate(self.routes):
            if pixels.size(2) == self.rows[index]:
                embedding, norm = route(pixels)
                found = True
        if not found:
            raise ValueError(f"pixels: {pixels.size(2)} rows, expected one of {self.rows}")
        return embedding, norm


def _torchscript(routes: Mapping[int, nn.Module], faces: dict[int, Tensor]) -> bytes:
    traced, file = (
        {r: torch.jit.trace(route, faces[r]) for r, route in routes.items()},
        io.BytesIO(),
    )
    torch.jit.save(
        next(iter(traced.values())) if len(traced) == 1 else torch.jit.script(_Switch(traced)), file
    )
    return file.getvalue()


# ---- pt2: a program for each route, named by its rows ----


def _program(route: nn.Module, faces: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(route, (faces,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _pt2(routes: Mapping[int, nn.Module], faces: dict[int, Tensor]) -> bytes:
    from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter, package_pt2

    whole, file = io.BytesIO(), io.BytesIO()
    package_pt2(
        whole, exported_programs={str(r): _program(route, faces[r]) for r, route in routes.items()}
    )
    first: dict[
        bytes, str
    ] = {}  # torch writes every program's weights: of equal ones, keep and name the first
    whole.seek(0)
    reader = PT2ArchiveReader(whole)
    with PT2ArchiveWriter(file) as writer:
        data = {name: reader.read_bytes(name) for name in reader.get_file_names()}
        same = {
            name: first.setdefault(hashlib.sha256(content).digest(), name)
            for name, content in data.items()
            if Path(name).name.startswith("weight_")
        }
        short = {Path(name).name: Path(target).name for name, target in same.items()}
        for name, content in data.items():
            if name.endswith("_weights_config.json"):
                table = json.loads(content)
                for entry in table["config"].values():
                    entry["path_name"] = short[entry["path_name"]]
                content = json.dumps(table).encode()
            if same.get(name, name) == name and not writer.has_record(name):
                writer.write_bytes(name, content)
    return file.getvalue()


# ---- ONNX: the routes are the branches of nested Ifs, their weights the initializers of the whole graph ----


def _onnx(routes: Mapping[int, nn.Module], faces: dict[int, Tensor]) -> bytes:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    models = {r: _onnx_route(route, faces[r], fuse=len(routes) == 1) for r, route in routes.items()}
    model = next(iter(models.values()))
    if len(models) > 1:
        model = _onnx_switch(models)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _onnx_route(route: nn.Module, faces: Tensor, fuse: bool) -> Any:
    """One route; unless ``fuse``, batch norms stay apart from the convolutions, whose weights routes share."""
    from onnxscript import optimizer

    program: Any = torch.onnx.export(
        _program(route, faces),
        dynamo=True,
        optimize=fuse,
        input_names=["pixels"],
        output_names=OUTPUTS,
        verbose=False,
    )
    if not fuse:
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    return program.model_proto


def _onnx_switch(models: dict[int, Any]) -> Any:
    from onnx import TensorProto, compose, helper

    weights: dict[Any, Any] = {}
    graphs = {}
    for r, model in models.items():
        graph = compose.add_prefix(model, f"r{r}/").graph
        kept = {}
        for one in graph.initializer:
            key = (
                one.data_type,
                tuple(one.dims),
                hashlib.sha256(one.raw_data or one.SerializeToString()).digest(),
            )
            kept[one.name] = weights.setdefault(key, one).name
        for node in graph.node:
            node.input[:] = [
                "pixels" if name == f"r{r}/pixels" else kept.get(name, name) for name in node.input
            ]
        graphs[r] = helper.make_graph(graph.node, f"route_{r}", [], graph.output)
    *lower, last = sorted(graphs)
    body = graphs[last]
    for r in reversed(lower):
        outputs = [
            helper.make_tensor_value_info(f"from{r}/{name}", TensorProto.FLOAT, None)
            for name in OUTPUTS
        ]
        names = [one.name for one in outputs]
        branch = helper.make_node("If", [f"is{r}"], names, then_branch=graphs[r], else_branch=body)
        body = helper.make_graph([branch], f"up_to_{r}", [], outputs)
    nodes = [helper.make_node("Shape", ["pixels"], ["rows"], start=2, end=3), *body.node]
    for r in lower:
        weights[r] = helper.make_tensor(f"row{r}", TensorProto.INT64, [1], [r])
        nodes.insert(1, helper.make_node("Equal", ["rows", f"row{r}"], [f"is{r}"]))
    for inner, name in zip(body.output, OUTPUTS, strict=True):
        nodes.append(helper.make_node("Identity", [inner.name], [name]))
    sizes = {
        "embedding": [
            "batch",
            models[last].graph.output[0].type.tensor_type.shape.dim[1].dim_value,
        ],
        "norm": ["batch"],
    }
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes[name]) for name in OUTPUTS
    ]
    pixels = helper.make_tensor_value_info(
        "pixels", TensorProto.FLOAT, ["batch", 3, "rows", "columns"]
    )
    graph = helper.make_graph(nodes, "btnet", [pixels], outputs, list(weights.values()))
    first = models[last]
    return helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version)


WRITERS = {"onnx": _onnx, "torchscript": _torchscript, "pt2": _pt2}
