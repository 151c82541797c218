"""Export formats: how to write a network to a file, and how to run the file for the check."""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tools.cli import check_output

INPUT, OUTPUT = "images", "probabilities"
METADATA_FILE = "metadata.json"  # within a .pt2

Run = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A file format.

    Attributes:
        title: Its name in the command's output.
        write: Writes a module, an example of its input (the batch size is free), metadata stored as JSON, and a path.
        load: Loads a file as a user would, on the CPU.
    """

    title: str
    write: Callable[[nn.Module, Tensor, Mapping[str, Any], Path], None]
    load: Callable[[Path], Run]


def _write_torch_export(module: nn.Module, example: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    archive = io.BytesIO()  # torch's own file writer ends the process when the disk is full
    torch.export.save(program, archive, extra_files={METADATA_FILE: json.dumps(metadata)})
    path.write_bytes(archive.getbuffer())


def _load_torch_export(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: module(images)


def _write_onnx(module: nn.Module, example: Tensor, metadata: Mapping[str, Any], path: Path) -> None:
    # The exporter reports for each of torchvision's operators that torchvision is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch 2.13 triggers this warning itself.
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


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


TORCH_EXPORT = Format("torch.export", _write_torch_export, _load_torch_export)
ONNX = Format("ONNX", _write_onnx, _load_onnx)


def choose_format(output: Path) -> Format:
    """Chooses the format by the file name.

    Raises:
        ValueError: The extension is unknown, a library is not installed, or the folder does not exist.
    """
    check_output("--output", output)
    if output.exists() and not output.is_file():
        raise ValueError(f"--output {output}: exists, and is not a file; name another")
    if output.suffix == ".pt2":
        return TORCH_EXPORT
    if output.suffix != ".onnx":
        raise ValueError(f"--output {output}: the name has to end in .onnx or .pt2")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--output {output} needs {', '.join(missing)}; pip install -e '.[export]'")
    return ONNX
