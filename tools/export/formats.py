"""The formats of exported networks: how each is written, and how it is run for the check."""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "images", "probabilities"
METADATA_FILE = "metadata.json"  # within a .pt2

Run = Callable[[Tensor], Tensor]


class Format(Protocol):
    """One of them. The module takes one tensor, of which the first dimension is free, and gives one."""

    title: str

    def write(self, module: nn.Module, example: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
        """Writes a module, with `metadata` as JSON beside it."""

    def load(self, path: Path) -> Run:
        """What runs it, on the CPU, as a user would."""


class TorchExport:
    """`torch.export.load(PATH).module()` runs it."""

    title = "torch.export"

    def write(self, module: nn.Module, example: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, archive, extra_files={METADATA_FILE: json.dumps(metadata)})
        path.write_bytes(archive.getbuffer())

    def load(self, path: Path) -> Run:
        module = torch.export.load(path).module()
        return lambda images: module(images)


class Onnx:
    """ONNX runtimes run it."""

    title = "ONNX"

    def write(self, module: nn.Module, example: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
        # It tells, for each of torchvision's operators, that torchvision is not installed.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Of torch 2.13 about its own code.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        program.save(path, external_data=False)

    def load(self, path: Path) -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def format_of(output: Path) -> Format:
    """The format that a file's name asks for.

    Raises:
        ValueError: None, or its libraries are not installed, or there is no such folder.
    """
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise ValueError(f"--output {output}: a folder; name a file in it")
    if output.suffix == ".pt2":
        return TorchExport()
    if output.suffix != ".onnx":
        raise ValueError(f"--output {output}: the name has to end in .onnx or .pt2")
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"--output {output}: {', '.join(lacking)} not installed; pip install 'googlenet-dali[export]'")
    return Onnx()
