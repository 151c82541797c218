"""Checkpoints: written whole or not at all, and loaded without running code from them."""

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts: to a temporary file, flushed to the disk, then renamed."""
    write_checkpoint(temporary := path.with_name(f".{path.name}.tmp"), state)
    temporary.replace(path)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in place and flushes it to the disk, for who renames it himself; nothing is left of a failure.

    Raises:
        OSError: The disk is full, for one.
    """
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch says only that its file is not as long as it should be
        raise


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on `device`.

    Raises:
        OSError: There is no such file, or it may not be read.
        ValueError: The file is damaged, or no checkpoint.
    """
    with open(path, "rb") as file:
        if damage := _damage(file):
            raise ValueError(f"{path} is damaged, or not a checkpoint: {damage}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the file is whole, so it is another kind of file; torch raises nearly everything then
        raise ValueError(f"{path} is not a checkpoint: torch finds other things than tensors and plain values in it") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def _damage(file: BinaryIO) -> str | None:
    """What is wrong with an archive: torch itself does not notice tensors whose bytes have changed."""
    try:
        with zipfile.ZipFile(file) as archive:
            # Nor does a checksum tell of this one bit, by which torch takes a tensor for a folder, and reads nothing.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            name = archive.testzip() or (folders[0] if folders else None)
            return name and f"{name} is not as it was written"
    except Exception as error:  # zipfile raises nearly everything, according to what is damaged
        return str(error) or type(error).__name__
