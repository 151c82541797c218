"""Recognizes compressed files by their first bytes."""

import shlex
from pathlib import Path
from typing import NamedTuple

from pipelines.printable import printable


class _Kind(NamedTuple):
    """A kind of compression.

    Attributes:
        begin: The first bytes of each file.
        command: The command that unpacks a file and removes it.
        ending: The ending that this command wants.
        short: A tar's ending that it turns into .tar.
    """

    begin: bytes
    command: str
    ending: str
    short: str


KINDS = {
    "gzip": _Kind(b"\x1f\x8b", "gunzip", ".gz", ".tgz"),
    "bzip2": _Kind(b"BZh", "bunzip2", ".bz2", ".tbz2"),
    "xz": _Kind(b"\xfd7zXZ\x00", "unxz", ".xz", ".txz"),
    "zstd": _Kind(b"\x28\xb5\x2f\xfd", "unzstd --rm", ".zst", ".tzst"),
}
TAR_ENDINGS = (".tar", *(f".tar{kind.ending}" for kind in KINDS.values()), *(kind.short for kind in KINDS.values()))


def compression_of(path: str | Path) -> str | None:
    """Returns the kind of compression of a local file, a key of `KINDS`; `None` if it is not compressed.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return compression_in(file.read(8))


def compression_in(begin: bytes) -> str | None:
    """Returns the kind of compression of a file that begins with these bytes."""
    return next((name for name, kind in KINDS.items() if begin.startswith(kind.begin)), None)


def compressed(place: str, kind: str) -> str:
    """Returns the message about a compressed tar: the command that unpacks it.

    Args:
        place: Path or URL of the tar.
        kind: The kind of its compression.
    """
    _, command, ending, short = KINDS[kind]
    path = shlex.quote(place)
    if not place.endswith((ending, short)):  # the command would refuse another ending
        named = shlex.quote(place + ending)
        command, path = f"mv {path} {named} && {command}", named
    return f"{printable(place)}: compressed ({kind}); unpack it with `{command} {printable(path)}`"
