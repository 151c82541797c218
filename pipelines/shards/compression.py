"""Recognizes compressed files by their first bytes."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from pipelines.printable import printable


class _Kind(NamedTuple):
    """A kind of compression.

    Attributes:
        begin: The first bytes of each file, up to eight. A tar begins with a name, which may well be `BZhang.jpg`.
        command: The command that unpacks a file and removes it.
        ending: The ending that this command wants.
        short: A tar's ending that it turns into .tar.
    """

    begin: re.Pattern[bytes]
    command: str
    ending: str
    short: str


KINDS = {
    "gzip": _Kind(re.compile(rb"\x1f\x8b"), "gunzip", ".gz", ".tgz"),
    "bzip2": _Kind(re.compile(rb"BZh[1-9](1AY&|\x17rE8)"), "bunzip2", ".bz2", ".tbz2"),
    "xz": _Kind(re.compile(rb"\xfd7zXZ\x00"), "unxz", ".xz", ".txz"),
    "zstd": _Kind(re.compile(rb"\x28\xb5\x2f\xfd"), "unzstd --rm", ".zst", ".tzst"),
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
    return next((name for name, kind in KINDS.items() if kind.begin.match(begin)), None)


def compressed(place: str, kind: str) -> str:
    """Returns the message about a compressed tar: the command that unpacks it.

    Args:
        place: Path or URL of the tar.
        kind: The kind of its compression.
    """
    _, command, ending, short = KINDS[kind]
    path = shlex.quote(place)
    if "://" in place:
        return f"{printable(place)}: compressed ({kind}); copy it, unpack the copy with `{command}`, and upload that"
    if not place.endswith((ending, short)):  # the command would refuse another ending
        named = shlex.quote(place + ending)
        command, path = f"mv {path} {named} && {command}", named
    return f"{printable(place)}: compressed ({kind}); unpack it with `{command} {printable(path)}`"
