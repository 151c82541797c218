"""Files that appear whole or not at all, and the folder for what can be found out again."""

import os
import uuid
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a file: a temporary file beside it, flushed to the disk, then renamed."""
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
    """The path of a file in the user's cache folder, the folder made.

    Raises:
        OSError: It cannot be made.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "googlenet-dali" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
