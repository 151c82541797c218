"""Image files of rare kinds, written byte by byte: what programs other than Pillow produce."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

SIZE = 64
_grid = np.mgrid[0:SIZE, 0:SIZE] * 4
RGB = np.dstack([_grid[0], _grid[1], (_grid[0] + _grid[1]) // 2]).astype(np.uint8)
GRAY = np.asarray(Image.fromarray(RGB).convert("L"))
ALPHA = np.full((SIZE, SIZE, 1), 128, np.uint8)
Array = NDArray[np.generic]

# Types of TIFF 6.0: SHORT and LONG. Tags: width, height, bits per sample, compression, photometric, strip offsets, samples per
# pixel, rows per strip, strip bytes, planar configuration, extra samples, sample format.
SHORT, LONG = 3, 4
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, CHANNELS, ROWS, BYTES, PLANAR, EXTRA, FORMAT = (
    *(256, 257, 258, 259, 262, 273, 277, 278),
    *(279, 284, 338, 339),
)


def tiff(pixels: Array, photometric: int, tags: dict[int, list[int]] | None = None, strips: list[bytes] | None = None) -> bytes:
    """Returns a little-endian TIFF. `tags` are added, or replace those that follow from the pixels."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    strips = strips or [pixels.tobytes()]
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    fields = {
        WIDTH: [SIZE],
        HEIGHT: [SIZE],
        BITS: [8 * pixels.itemsize] * channels,
        COMPRESSION: [1],
        PHOTOMETRIC: [photometric],
        OFFSETS: offsets,
        CHANNELS: [channels],
        ROWS: [SIZE],
        BYTES: list(map(len, strips)),
        FORMAT: [1] * channels,
        **(tags or {}),
    }
    data = b"".join(strips)
    directory = 8 + len(data)
    far, entries, extra = directory + 2 + 12 * len(fields) + 4, b"", b""
    for tag, values in sorted(fields.items()):
        type_ = LONG if tag in (OFFSETS, BYTES) else SHORT
        packed = struct.pack(f"<{len(values)}{'I' if type_ == LONG else 'H'}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", far + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, type_, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", directory) + data + struct.pack("<H", len(fields)) + entries + bytes(4) + extra


def bmp(data: bytes, bits: int, compression: int = 0, palette: bytes = b"", offset: int = 0) -> bytes:
    """Returns a BMP; `offset` is that of the pixels, if it shall be wrong."""
    start = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, SIZE, SIZE, 1, bits, compression, len(data), 2835, 2835, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, offset or start) + info + palette + data


def encoded(pixels: Array, format_: str, mode: str | None = None, **options: object) -> bytes:
    """Returns the file that Pillow writes."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, format_, **options)
    return file.getvalue()


def png_header(width: int, height: int, deflated: bytes = zlib.compress(b"")) -> bytes:
    """Returns a gray PNG whose header states a size, whatever its data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", deflated) + chunk(b"IEND", b"")


def png_bomb(side: int = 30_000) -> bytes:
    """Returns a valid PNG of a megabyte with 900 million black pixels."""
    length, block = side * (side + 1), 10**6  # each line begins with the number of its filter
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)  # can be repeated
    last = packer.compress(bytes(length % block)) + packer.flush()
    checksum = struct.pack(">HH", length % 65521, 1)  # Adler-32 (RFC 1950) of that many zeros
    return png_header(side, side, b"\x78\xda" + packed * (length // block) + last + checksum)


def png_with_long_chunk() -> bytes:
    """A PNG with one wrong byte: its EXIF data claim to take 4 GB."""
    file = encoded(RGB, "PNG")
    at = file.index(b"IDAT") - 4
    return file[:at] + b"\xff\0\0\4eXIfabcd\0\0\0\0" + file[at:]


def short_bmp() -> bytes:
    """A BMP whose pixels begin later than they should, so that the last ones are missing. DALI reads all of it, but no part."""
    return bmp(RGB[::-1, :, ::-1].tobytes(), 24, offset=255)


def overflowing_tiff() -> bytes:
    """A TIFF with a second width. nvImageCodec makes its buffer for that one, and libtiff fills it with lines of the first."""
    file = tiff(RGB, 2, {ROWS: [48], 274: [2]})  # mirrored
    at = file.rindex(struct.pack("<HHI", ROWS, SHORT, 1))
    return file[:at] + struct.pack("<H", WIDTH) + file[at + 2 :]


def crashing_jpeg2000() -> list[bytes]:
    """Two JPEG 2000 files at which OpenJPEG in nvImageCodec 0.9 ends the process, with the signals 11 and 8."""
    tiny = np.zeros((2, 2), np.uint8)
    file, codestream = encoded(tiny, "JPEG2000"), encoded(tiny, "JPEG2000", no_jp2=True)
    length = file.index(b"\xff\x4f\xff\x51") + 4  # of the SIZ segment; the number of channels is at its end
    return [file[:length] + b"\x7f" + file[length + 1 :], codestream[:40] + b"\0\0" + codestream[42:]]


def _packed(values: Array, bits: int) -> bytes:
    digits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(SIZE, -1), axis=1).tobytes()


def _cmyk_without_adobe() -> bytes:
    file = encoded(RGB, "JPEG", "CMYK", quality=95)
    place = file.index(b"\xff\xee\x00\x0eAdobe")
    return file[:place] + file[place + 16 :]


def _marker(file: bytes, marker: int) -> bytes:
    place = file.index(b"\xff\xc0")
    return file[: place + 1] + bytes([marker]) + file[place + 2 :]


_lab = ImageCms.profileToProfile(
    Image.fromarray(RGB), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
)
_wide, _wide_gray = RGB.astype(np.uint16) * 257, GRAY.astype(np.uint16) * 257
_web = RGB // 51 * 51  # colors of Pillow's palette
_runs = b"".join(b"".join(bytes([1, value >> 4 << 4]) for value in row) + b"\0\0" for row in GRAY[::-1].tolist()) + b"\0\1"
_grays = bytes(value for level in range(16) for value in (level * 17, level * 17, level * 17, 0))
_15_bits = (RGB[::-1].astype(np.uint16) >> 3) @ np.array([1 << 10, 1 << 5, 1], np.uint16)

# Kinds that are encoded anew: the file, and its pixels.
ENCODED_ANEW: dict[str, tuple[bytes, Array]] = {
    "tiff Lab": (tiff(np.asarray(_lab), 8), RGB),
    "tiff gray with alpha": (tiff(np.dstack([GRAY, ALPHA]), 1, {EXTRA: [2]}), GRAY),
    "tiff multiplied by alpha": (tiff(np.dstack([RGB // 2, ALPHA]), 2, {EXTRA: [1]}), RGB),
    "tiff 4 bits": (tiff(GRAY, 1, {BITS: [4]}, [_packed(GRAY >> 4, 4)]), (GRAY >> 4) * 17),
    "tiff CMYK 16 bits": (tiff(65535 - np.dstack([_wide, _wide[..., :1] * 0 + 65535]), 5), RGB),
    "tiff lzma": (encoded(RGB, "TIFF", compression="lzma"), RGB),
    "tiff tiled without need": (tiff(RGB, 2, {322: [16], 323: [16]}), RGB),
    "bmp 15 bits": (bmp(_15_bits.astype("<u2").tobytes(), 16), RGB),
    "bmp rle4": (bmp(_runs, 4, 2, _grays), (GRAY >> 4) * 17),
    "jpeg CMYK without Adobe": (_cmyk_without_adobe(), RGB),
    "pnm P3": (b"P3 64 64 255\n" + " ".join(map(str, RGB.reshape(-1))).encode(), RGB),
    "pnm P2": (b"P2 64 64 255\n" + " ".join(map(str, GRAY.reshape(-1))).encode(), GRAY),
    "pnm 100 is white": (b"P6 64 64 100\n" + (RGB.astype(int) * 100 // 255).astype(np.uint8).tobytes(), RGB),
    "pnm comment, 15 is white": (b"P5\n# 64 255\n64 64 15\n" + (GRAY >> 4).tobytes(), (GRAY >> 4) * 17),
    "jp2": (encoded(RGB, "JPEG2000"), RGB),
    "jp2 codestream": (encoded(RGB, "JPEG2000", no_jp2=True), RGB),
    "jp2 16 bits": (encoded(_wide_gray, "JPEG2000"), GRAY),
    "jp2 signed": (encoded(RGB ^ 128, "JPEG2000", signed=True), RGB),
    "jp2 gray with alpha": (encoded(np.dstack([GRAY, ALPHA]), "JPEG2000"), GRAY),
    "jp2 YCbCr": (encoded(RGB, "JPEG2000", "YCbCr"), RGB),
    "jp2 CMYK": (encoded(RGB, "JPEG2000", "CMYK"), RGB),
}
# Kinds that are refused, and the reason's beginning.
REFUSED: dict[str, tuple[bytes, str]] = {
    "tiff float 0..1": (tiff((GRAY / 255).astype(np.float32), 1, {FORMAT: [3]}), "tiff with float samples"),
    "tiff float 0..255": (tiff(GRAY.astype(np.float32), 1, {FORMAT: [3]}), "tiff with float samples"),
    "tiff float rgb": (tiff((RGB / 255).astype(np.float32), 2, {FORMAT: [3, 3, 3]}), "tiff with float samples"),
    "tiff double": (tiff(GRAY / 255, 1, {FORMAT: [3]}), "tiff with float samples"),
    "tiff int8": (tiff((GRAY // 2).astype(np.int8), 1, {FORMAT: [2]}), "tiff with signed samples"),
    "tiff int16": (tiff(GRAY.astype(np.int16), 1, {FORMAT: [2]}), "tiff with signed samples"),
    "tiff uint32": (tiff(GRAY.astype(np.uint32) << 24, 1), "tiff with 32 bits per sample"),
    "tiff 16 bits white is 0": (tiff(65535 - _wide_gray, 0), "tiff with 16 bits per sample in which 0 is white"),
    "tiff 16 bits in planes": (
        tiff(_wide, 2, {PLANAR: [2]}, [_wide[..., i].tobytes() for i in range(3)]),
        "tiff with 16 bits per sample in separate planes",
    ),
    "tiff rgb 4 bits": (
        tiff(RGB, 2, {BITS: [4] * 3}, [_packed((RGB >> 4).reshape(SIZE, -1), 4)]),
        "tiff with 4 bits per sample",
    ),
    "tiff ICC Lab": (tiff(RGB, 9), "tiff with photometric interpretation 9"),
    "pnm 1000 is white": (b"P5 64 64 1000\n" + (_wide_gray // 66).astype(">u2").tobytes(), "pnm in which 1000 is white"),
    "pnm float": (b"Pf\n64 64\n-1.0\n" + GRAY.astype("<f4").tobytes(), "ppm of an unusual kind"),
    "jpeg lossless": (_marker(encoded(RGB, "JPEG"), 0xC3), "jpeg of type SOF3"),
}
# Kinds that are kept, and their pixels. Pillow itself misreads some of them.
KEPT: dict[str, tuple[bytes, Array]] = {
    "tiff 16 bits gray": (tiff(_wide_gray, 1), GRAY),
    "tiff 16 bits": (tiff(_wide, 2), RGB),
    "tiff white is 0": (tiff(255 - GRAY, 0), GRAY),
    "tiff planes": (tiff(RGB, 2, {PLANAR: [2]}, [RGB[..., i].tobytes() for i in range(3)]), RGB),
    "tiff alpha": (tiff(np.dstack([RGB, ALPHA]), 2, {EXTRA: [2]}), RGB),
    "tiff CMYK": (tiff(255 - np.dstack([RGB, 0 * ALPHA + 255]), 5), RGB),
    "tiff zstd": (encoded(RGB, "TIFF", compression="zstd"), RGB),
    "tiff palette": (encoded(_web, "TIFF", "P"), _web),
    "bmp rle8 and others": (encoded(RGB, "BMP"), RGB),
    "bmp gray": (encoded(GRAY, "BMP"), GRAY),
    "jpeg CMYK": (encoded(RGB, "JPEG", "CMYK", quality=98), RGB),
    "jpeg rgb": (encoded(RGB, "JPEG", quality=98, keep_rgb=True), RGB),
    "png 16 bits": (encoded(_wide_gray, "PNG"), GRAY),
    "png palette": (encoded(_web, "PNG", "P"), _web),
    "pnm 16 bits": (b"P6 64 64 65535\n" + _wide.astype(">u2").tobytes(), RGB),
    "pnm bits": (b"P4 64 64\n" + np.packbits(GRAY < 128, axis=1).tobytes(), np.where(GRAY < 128, 0, 255)),
    "webp": (encoded(RGB, "WEBP", lossless=True), RGB),
}
