"""Checkpoint files. They are written atomically, and loading one runs no code from it."""

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists, and dicts to a temporary file, flushes it to the disk, and renames it."""
    write_checkpoint(temporary := path.with_name(f".{path.name}.tmp"), state)
    temporary.replace(path)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint and flushes it to the disk. The caller renames it. A failure leaves no file.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch only says that the file is too short
        raise


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint and verifies its checksums.

    Args:
        path: The file.
        device: Device of its tensors.

    Raises:
        OSError: The file does not exist, or it cannot be read.
        ValueError: The file is damaged, or it is not a checkpoint.
    """
    with open(path, "rb") as file:
        if damage := _damage(file):
            raise ValueError(f"{path} is damaged, or not a checkpoint: {damage}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the file is whole, but not a checkpoint; torch raises almost anything then
        raise ValueError(f"{path} is not a checkpoint: it contains more than tensors and plain values") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def _damage(file: BinaryIO) -> str | None:
    """Describes the damage of an archive, if any. torch itself does not notice tensors whose bytes have changed."""
    try:
        with zipfile.ZipFile(file) as archive:
            # No checksum covers this bit. If it is set, torch takes a tensor for a folder and reads nothing.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            name = archive.testzip() or (folders[0] if folders else None)
            return name and f"{name} is not as it was written"
    except Exception as error:  # zipfile raises almost anything, depending on the damage
        return str(error) or type(error).__name__
