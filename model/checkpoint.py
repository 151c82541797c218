"""Checkpoint files. They are written atomically, and loading one runs no code from it."""

import errno
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from model.pickled import unknown_objects

# The first number in a file of torch's format before 1.6, which torchvision's published file of 2018 has, as it is pickled.
_OLD_FORMAT = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PICKLES = 4  # after that number: version, machine, content, and the names of the storages
NAMED = 3  # objects that an error lists


class ForeignObjectsError(ValueError):
    """A file contains more than tensors and plain values."""


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
        ForeignObjectsError: It contains more than tensors and plain values.
        ValueError: The file is damaged, or it is not a checkpoint.
    """
    with open(path, "rb") as file:
        if damage := _damage(file):
            raise ValueError(f"{path} is damaged, or not a checkpoint: {damage}")
        _refuse_foreign_objects(path, _objects_in_archive(file))
    return _load(path, device)


def load_weights_file(path: Path) -> dict[str, Any]:
    """Reads a file that torch.save wrote, here or elsewhere: as `load_checkpoint`, or in torch's format before 1.6.

    The older format has no checksums.

    Raises:
        OSError, ForeignObjectsError, ValueError: As in `load_checkpoint`.
    """
    with open(path, "rb") as file:
        if (place := file.read(32).find(_OLD_FORMAT)) < 0:
            return load_checkpoint(path)
        file.seek(place + len(_OLD_FORMAT))
        try:
            objects = [name for _ in range(_OLD_PICKLES) for name in unknown_objects(file)]
        except Exception as error:
            raise ValueError(f"{path} is damaged: it is cut short, or not as torch.save wrote it") from error
        _refuse_foreign_objects(path, objects)
    return _load(path, "cpu")


def _load(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises almost anything, and its messages advise to run the code of the file
        raise ValueError(f"{path} is damaged, or not a checkpoint: torch finds no tensors and plain values in it") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def _refuse_foreign_objects(path: Path, objects: Sequence[str]) -> None:
    if objects:
        more = f" and {len(objects) - NAMED} more" if len(objects) > NAMED else ""
        names = ascii(", ".join(objects[:NAMED]))[1:-1]
        raise ForeignObjectsError(
            f"{path} is not a checkpoint: it contains more than tensors and plain values, which is not loaded: {names}{more}"
        )


def _objects_in_archive(file: BinaryIO) -> list[str]:
    with zipfile.ZipFile(file) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    try:
        return [name for content in pickles for name in unknown_objects(io.BytesIO(content))]
    except Exception:  # pickletools raises almost anything, and torch.load will refuse the pickle
        return []


def _damage(file: BinaryIO) -> str | None:
    """Describes the damage of an archive, if any. torch itself does not notice tensors whose bytes have changed."""
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch.save never compresses. Compressed or overlapping entries could take any amount of memory.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "it is a compressed archive"
            if sum(entry.file_size for entry in entries) > size or len({*archive.namelist()}) < len(entries):
                return "its entries overlap"
            # No checksum covers this bit. If it is set, torch takes a tensor for a folder and reads nothing.
            folders = [entry.filename for entry in entries if entry.external_attr & 0x10]
            name = archive.testzip() or (folders[0] if folders else None)
            return name and f"{ascii(name)[1:-1]} is not as it was written"
    except Exception as error:  # zipfile raises almost anything, depending on the damage; EINVAL if it seeks before the start
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        return f"it is not an archive as torch.save writes it ({' '.join(str(error).split()) or type(error).__name__})"
