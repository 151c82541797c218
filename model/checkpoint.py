"""Checkpoints: written whole or not at all, and loaded without running code from them."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts: to a temporary file, flushed to the disk, then renamed."""
    write_checkpoint(temporary := path.with_name(f".{path.name}.tmp"), state)
    temporary.replace(path)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in place and flushes it to the disk, for who renames it himself; nothing is left of a failure."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save_checkpoint` wrote, its tensors on `device`.

    Raises:
        ValueError: The file is damaged, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not notice tensors whose bytes have changed
            if damaged := archive.testzip():
                raise ValueError(f"{path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location=device, weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state
