"""Mutations of tars and images. Each is a function of a seed.

A mutation of a tar knows which bytes of the original it left alone and where they are now. So a test can tell whether a sample
that is accepted afterwards is one of the original's.
"""

import io
import random
import tarfile
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from tests.conftest import CLASSES

BLOCK = tarfile.BLOCKSIZE
FIELDS = {  # of a member's header: first byte and length
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
SIZES = (b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"            ")


class Member(NamedTuple):
    """A member of the original: its name, and where its header and its data begin."""

    name: str
    header: int
    offset: int
    data: bytes


class Original(NamedTuple):
    """A tar before it is mutated, and its members."""

    content: bytes
    members: list[Member]

    def label_of(self, image: bytes) -> bytes | None:
        """Returns the label of an image of this tar."""
        for one, other in zip(self.members[::2], self.members[1::2], strict=True):
            if one.data == image:
                return other.data
        return None


@dataclass(frozen=True)
class Mutated:
    """A mutated tar.

    Attributes:
        content: Its bytes.
        origin: For runs of bytes: where they are now, how many, and where they were in the original. Other bytes are new.
        how: The mutations, in words.
    """

    content: bytes
    origin: tuple[tuple[int, int, int], ...]
    how: str

    def is_original(self, offset: int, member: Member) -> bool:
        """Returns whether the data at an offset, and the header before it, are those of a member of the original."""
        header, data = offset - (member.offset - member.header), offset
        return self._is(header, member.offset - member.header, member.header) and self._is(
            data, len(member.data), member.offset
        )

    def _is(self, now: int, length: int, then: int) -> bool:
        """Returns whether these bytes are now what they were, in the same order."""
        while length > 0:
            run = next((run for run in self.origin if run[0] <= now < run[0] + run[1]), None)
            if run is None or run[2] + (now - run[0]) != then:
                return False
            step = min(length, run[0] + run[1] - now)
            now, then, length = now + step, then + step, length - step
        return True


def make_original(images: list[bytes], labels: list[bytes], first: int = 0, form: int = tarfile.USTAR_FORMAT) -> Original:
    """Returns a tar of these samples. Keys are numbers from `first` on."""
    content, members = io.BytesIO(), []
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
            for extension, data in (("jpg", image), ("cls", label)):
                entry = tarfile.TarInfo(f"{i:06d}.{extension}")
                entry.size = len(data)
                if form == tarfile.PAX_FORMAT:
                    entry.pax_headers = {"comment": "x" * (i % 7)}
                header = tar.offset
                tar.addfile(entry, io.BytesIO(data))
                offset = tar.offset - len(data) - -len(data) % BLOCK
                members.append(Member(entry.name, header, offset, data))
    return Original(content.getvalue(), members)


def mutate_tar(original: Original, seed: int) -> Mutated:
    """Returns the tar after one to three mutations."""
    draw = random.Random(seed)
    content, origin, how = bytearray(original.content), [(0, len(original.content), 0)], []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.choice((_flip, _flip, _fill, _header, _header, _header, _cut, _remove, _insert, _repeat))
        start, end, new, words = kind(bytes(content), original, draw)
        content[start:end] = new
        origin = _shifted(origin, start, end, len(new))
        how.append(words)
    return Mutated(bytes(content), tuple(origin), ", ".join(how))


Edit = tuple[int, int, bytes, str]  # bytes from, to, what replaces them, and in words


def _flip(content: bytes, original: Original, draw: random.Random) -> Edit:
    at = draw.randrange(max(1, len(content)))
    return at, at + 1, bytes([content[at] ^ 1 << draw.randrange(8)]) if content else b"", f"a bit flipped at {at}"


def _fill(content: bytes, original: Original, draw: random.Random) -> Edit:
    at, length = draw.randrange(max(1, len(content))), draw.choice((1, 8, 100, BLOCK, 3 * BLOCK))
    new = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))[: len(content) - at]
    return at, at + len(new), new, f"{len(new)} bytes overwritten at {at}"


def _header(content: bytes, original: Original, draw: random.Random) -> Edit:
    """Changes a field of a header, and mostly mends the checksum, so that the change is not found at once."""
    member, name = draw.choice(original.members), draw.choice([*FIELDS])
    start, length = FIELDS[name]
    block = bytearray(content[member.header : member.header + BLOCK].ljust(BLOCK, b"\0"))
    new = {
        "size": draw.choice((*SIZES, b"%011o\0" % draw.randrange(len(member.data) * 2 + 2))),
        "type": draw.choice((b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"\0", b"\xff")),
        "name": draw.choice(
            (
                b"../../x.jpg",
                b"/etc/x.jpg",
                b"a/b\x1b[31m.cls",
                b"\xff\xfe.jpg",
                b"",
                b".jpg",
                draw.choice(original.members).name.encode(),
            )
        ),
        "link": draw.choice((draw.choice(original.members).name.encode(), b"/etc/passwd", b"../../../etc/passwd")),
    }.get(name, draw.randbytes(length))
    block[start : start + length] = new.ljust(length, b"\0")[:length]
    if draw.random() < 0.8:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return member.header, member.header + BLOCK, bytes(block), f"{name} of {member.name} is {bytes(new)[:20]!r}"


def _cut(content: bytes, original: Original, draw: random.Random) -> Edit:
    at = draw.randrange(max(1, len(content)))
    at = draw.choice((at, at // BLOCK * BLOCK))
    return at, len(content), b"", f"cut short at {at}"


def _remove(content: bytes, original: Original, draw: random.Random) -> Edit:
    start = draw.randrange(max(1, len(content))) // BLOCK * BLOCK
    length = draw.choice((1, BLOCK, 2 * BLOCK, 5 * BLOCK))
    return start, start + length, b"", f"{length} bytes removed at {start}"


def _insert(content: bytes, original: Original, draw: random.Random) -> Edit:
    at, length = draw.randrange(max(1, len(content))), draw.choice((1, BLOCK, 2 * BLOCK))
    at = draw.choice((at, at // BLOCK * BLOCK))
    return at, at, draw.choice((bytes(length), draw.randbytes(length))), f"{length} bytes inserted at {at}"


def _repeat(content: bytes, original: Original, draw: random.Random) -> Edit:
    blocks = max(1, len(content) // BLOCK)
    start, count, at = draw.randrange(blocks) * BLOCK, draw.randrange(1, 5), draw.randrange(blocks) * BLOCK
    return at, at, content[start : start + count * BLOCK], f"{count} blocks from {start} repeated at {at}"


def _shifted(origin: list[tuple[int, int, int]], start: int, end: int, new: int) -> list[tuple[int, int, int]]:
    """Returns where bytes of the original are, after the bytes from start to end were replaced by others."""
    runs = []
    for now, length, then in origin:
        if now < start:
            runs.append((now, min(length, start - now), then))
        if now + length > end:
            skip = max(0, end - now)
            runs.append((now + skip + new - (end - start), length - skip, then + skip))
    return runs


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")
EXTENSIONS = dict(zip(FORMATS, ("jpg", "png", "webp", "bmp", "tif", "jp2", "pnm"), strict=True))
SAVE_OPTIONS: dict[str, list[dict[str, object]]] = {
    "JPEG": [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"restart_marker_blocks": 2}],
    "PNG": [{}, {"compress_level": 0}],
    "WEBP": [{}, {"lossless": True}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "packbits"}],
}
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "1"),
    "BMP": ("RGB", "L", "P", "1"),
    "PPM": ("RGB", "L"),
}


def make_image(picture: Image.Image, seed: int) -> tuple[str, bytes]:
    """Returns the extension and the bytes of a picture, in a format, mode and encoding that the seed chooses."""
    draw = random.Random(seed)
    form = draw.choice(FORMATS)
    mode = draw.choice(MODES.get(form, ("RGB", "L")))
    encoded = io.BytesIO()
    picture.convert(mode).save(encoded, form, **draw.choice(SAVE_OPTIONS.get(form, [{}])))
    return EXTENSIONS[form], encoded.getvalue()


def mutate_image(image: bytes, seed: int) -> tuple[bytes, str]:
    """Returns the bytes after one to four mutations, and these in words. Half of them lie in the first 64 bytes."""
    draw, content, how = random.Random(seed), bytearray(image), []
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(min(len(content), draw.choice((64, len(content)))) or 1)
        kind = draw.choice(("flip", "fill", "number", "cut", "remove", "insert"))
        length = draw.choice((1, 2, 4, 16))
        if kind == "flip" and content:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "fill":
            content[at : at + length] = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))
        elif kind == "number":
            number = draw.choice((0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))
            content[at : at + 4] = (number & 0xFFFFFFFF).to_bytes(4, draw.choice(("little", "big")))
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + length]
        else:
            content[at:at] = draw.randbytes(length)
        how.append(f"{kind} at {at}")
    return bytes(content), ", ".join(how)


LABELS = [str(number).encode() for number in range(len(CLASSES))]
