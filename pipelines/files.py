"""Writes files atomically, and locates the user's cache folder."""

import os
import uuid
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: writes a temporary file beside it, flushes it to disk and renames it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def user_cache(kind: str, name: str) -> Path:
    """Returns the path of a file in the user's cache folder, after creating the folder.

    Raises:
        OSError: The folder cannot be created.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "googlenet-dali" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
