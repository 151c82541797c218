"""Where competitors write: of all that they leave behind, nothing is left."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.bench.converters import ENVIRONMENT


@contextlib.contextmanager
def open_scratch(parent: Path, needed_bytes: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """A new folder, removed in the end with all that is in it, and the environment for the processes that write there.

    What they write to the system's folder for temporary files, asked or not, goes to one that is removed as well. It is no part
    of the folder: sockets lie there, whose paths Linux limits to 107 bytes.

    Args:
        parent: Folder to make it in; made where it is not there.
        needed_bytes: That are going to be written.

    Raises:
        ValueError: There is not so much space.
        OSError: The folder cannot be made.
    """
    parent = parent.absolute()  # competitors run in another folder
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ValueError(
            f"{parent}: {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB needed; name another folder with --scratch, "
            "or fewer --images"
        )
    with (
        tempfile.TemporaryDirectory(prefix="throughput-", dir=parent) as folder,
        tempfile.TemporaryDirectory(prefix="throughput-") as temporary,
    ):
        caches = {
            "DATA_OPTIMIZER_CACHE_FOLDER": f"{folder}/litdata-chunks",
            "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{folder}/litdata-data",
        }
        yield Path(folder), {**ENVIRONMENT, "TMPDIR": temporary, **caches}
