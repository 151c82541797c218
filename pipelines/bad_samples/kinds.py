"""Kinds of images that the training decoder reads wrongly, or not at all, although their files are intact.

Found by comparing DALI 2.4 and nvImageCodec 0.9 with known pixels and with Pillow 13 for about 200 kinds of files;
`tests/pipelines/test_kinds.py` has an image of each kind that differed.
"""

import struct
from typing import NamedTuple

from nvidia import nvimgcodec

from pipelines.bad_samples import png
from pipelines.bad_samples.jpeg import frame_type, has_adobe_segment

FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # ITU-T T.81, table B.1: sequential and progressive, not lossless or hierarchical
TIFF_MARKS = {b"II*\0": "<", b"MM\0*": ">"}  # BigTIFF, II+, is judged by nvImageCodec's view of it alone
# Tags of TIFF 6.0 and the values that they have if they are missing.
BITS, COMPRESSION, PHOTOMETRIC, CHANNELS, PLANAR, EXTRA, FORMAT = 258, 259, 262, 277, 284, 338, 339
DEFAULTS = {BITS: (1,), COMPRESSION: (1,), PHOTOMETRIC: (1,), CHANNELS: (1,), PLANAR: (1,), EXTRA: (), FORMAT: (1,)}
WAY_OUT = "save it with 8 bits per channel"
EMPTY_FILE, NOT_AN_IMAGE = "empty file", "not an image"
FORMATS = {2: "signed", 3: "float", 5: "complex", 6: "complex"}
# None, CCITT, LZW, JPEG, Deflate, PackBits, old Deflate, Zstandard.
COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000)
WHITE_IS_ZERO, GRAY, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
# The signature box of a JP2 file, and the first two markers of a codestream (ITU-T T.800, I.5.1 and A.2).
JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
# How files of a format begin, and the format's name. The decoder reads some of them; these names are for those that it refuses.
SIGNATURES = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II": "tiff",
    b"MM": "tiff",
    b"\0\0\0\x0cjP": "jpeg2000",
    b"\xff\x4f\xff\x51": "jpeg2000",
    b"ftypavif": "avif",
    b"ftypheic": "heic",
    **{f"P{digit}".encode() + blank: "pnm" for digit in "1234567fF" for blank in (b"\n", b" ", b"\r")},
}


class Kind(NamedTuple):
    """A kind of image that training must not get.

    Attributes:
        name: The kind in words, for messages.
        pillow_reads_it: Whether Pillow reads it as it is meant, so that it can be encoded anew.
    """

    name: str
    pillow_reads_it: bool = True

    @property
    def reason(self) -> str:
        """Why training must not get the image, and the way out."""
        way_out = "`shards convert` encodes it anew" if self.pillow_reads_it else WAY_OUT
        return f"{self.name}, which training cannot read as it is meant: {way_out}"


def misread_kind(stream: nvimgcodec.CodeStream, encoded: bytes) -> Kind | None:
    """Returns the kind of an image if the training decoder misreads it, judged by its header, or None.

    Args:
        stream: The image as nvImageCodec sees it.
        encoded: Content of its file.
    """
    if not stream.num_channels and stream.codec_name != "bmp":
        return Kind(f"{stream.codec_name} with samples of an unknown type", pillow_reads_it=False)
    judge = {"tiff": _tiff, "pnm": _pnm, "bmp": _bmp, "jpeg": _jpeg}.get(stream.codec_name)
    return judge(stream, encoded) if judge else None


def why_unknown(encoded: bytes) -> str:
    """Returns what is wrong with a file in which nvImageCodec sees no image."""
    if not encoded:
        return EMPTY_FILE
    if png.is_cut_short(encoded):
        return png.CUT_SHORT
    start = encoded[4:12] if encoded[4:8] == b"ftyp" else encoded[:8]
    name = next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), None)
    return f"{name} image that the training decoder cannot read" if name else NOT_AN_IMAGE


def why_unsafe(encoded: bytes) -> str:
    """Returns why an image must not reach a decoder, or an empty text: it could end the process, or fill the memory.

    OpenJPEG in nvImageCodec 0.9 ends the process at some damaged headers of JPEG 2000: signal 11 if the length of the SIZ
    segment is wrong, and signal 8 for an image without channels. Pillow's OpenJPEG 2.5.4 ended it at none of 2,000 mutations.

    If a tag of a TIFF occurs twice, nvImageCodec 0.9 takes the last one for the size of its buffer. libtiff, which fills the
    buffer, takes the first.
    """
    if encoded.startswith(JPEG_2000):
        return "jpeg2000 image, which can crash the training decoder: `shards convert` encodes such images anew"
    order = TIFF_MARKS.get(encoded[:4])
    if order is None:
        return ""
    try:
        [directory] = struct.unpack_from(f"{order}I", encoded, 4)
        [count] = struct.unpack_from(f"{order}H", encoded, directory)
        tags = [struct.unpack_from(f"{order}H", encoded, directory + 2 + 12 * i)[0] for i in range(count)]
    except struct.error:  # cut short; the decoder will tell
        return ""
    return "damaged tiff image (a tag occurs twice)" if len(set(tags)) < len(tags) else ""


def _tiff(stream: nvimgcodec.CodeStream, encoded: bytes) -> Kind | None:
    tags = _tiff_tags(encoded)
    bits, formats, photometric, channels = max(tags[BITS]), set(tags[FORMAT]), tags[PHOTOMETRIC][0], tags[CHANNELS][0]
    if formats != {1}:
        names = {FORMATS.get(number, f"format {number}") for number in formats}
        return Kind(f"tiff with {'/'.join(sorted(names))} samples", pillow_reads_it=False)
    if bits > 16 or len(set(tags[BITS])) > 1:
        return Kind(f"tiff with {'/'.join(map(str, tags[BITS]))} bits per sample", pillow_reads_it=False)
    if photometric == LAB:
        return Kind("tiff in the color space Lab")
    if photometric not in (WHITE_IS_ZERO, GRAY, RGB, PALETTE, CMYK, YCBCR):
        return Kind(f"tiff with photometric interpretation {photometric}", pillow_reads_it=False)
    if bits > 8 and photometric == WHITE_IS_ZERO:
        return Kind(f"tiff with {bits} bits per sample in which 0 is white", pillow_reads_it=False)
    if bits > 8 and channels > 1 and tags[PLANAR] == (2,):
        return Kind(f"tiff with {bits} bits per sample in separate planes", pillow_reads_it=False)
    if (bits > 8 and photometric == CMYK) or (1 < bits < 8 and photometric != PALETTE):
        return Kind(f"tiff with {bits} bits per sample", pillow_reads_it=bits == 16 or (channels == 1 and bits in (2, 4)))
    if channels > 1 and photometric in (WHITE_IS_ZERO, GRAY):
        return Kind("gray tiff with alpha")
    if tags[EXTRA][:1] == (1,):
        return Kind("tiff with colors multiplied by alpha")
    if tags[COMPRESSION][0] not in COMPRESSIONS:
        return Kind(f"tiff with compression {tags[COMPRESSION][0]}")
    return None


def _tiff_tags(encoded: bytes) -> dict[int, tuple[int, ...]]:
    """Returns the values of the tags in `DEFAULTS`, of the first image of a TIFF. Tags that cannot be read have the default."""
    tags: dict[int, tuple[int, ...]] = dict(DEFAULTS)
    order = TIFF_MARKS.get(encoded[:4])
    if order is None:
        return tags
    try:
        [directory] = struct.unpack_from(f"{order}I", encoded, 4)
        [count] = struct.unpack_from(f"{order}H", encoded, directory)
        for place in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, type_, length = struct.unpack_from(f"{order}HHI", encoded, place)
            if tag in DEFAULTS and type_ == 3 and 0 < length <= 16:  # SHORT
                [far] = struct.unpack_from(f"{order}I", encoded, place + 8)
                tags[tag] = struct.unpack_from(f"{order}{length}H", encoded, place + 8 if length <= 2 else far)
    except struct.error:  # cut short, or not what it seems; the decoder will tell
        pass
    return tags


def _pnm(stream: nvimgcodec.CodeStream, encoded: bytes) -> Kind | None:
    if encoded[:2] in (b"P2", b"P3"):
        return Kind("pnm in plain text")
    if encoded[:2] in (b"P5", b"P6"):
        lines = [line.partition(b"#")[0] for line in encoded[2:1024].split(b"\n")]
        numbers = b"\n".join(lines).split(maxsplit=3)
        if len(numbers) > 2 and numbers[2].isdigit() and int(numbers[2]) not in (255, 65535):
            return Kind(f"pnm in which {int(numbers[2])} is white", pillow_reads_it=int(numbers[2]) < 256)
    return None


def _bmp(stream: nvimgcodec.CodeStream, encoded: bytes) -> Kind | None:
    if stream.num_channels:
        return None
    bits, compression = struct.unpack_from("<HI", encoded, 28) if len(encoded) >= 34 else (0, 0)
    return Kind(f"bmp with {bits} bits per pixel and compression {compression}")


def _jpeg(stream: nvimgcodec.CodeStream, encoded: bytes) -> Kind | None:
    if stream.precision not in (0, 8):
        return Kind(f"jpeg with {stream.precision} bits per sample", pillow_reads_it=False)
    if stream.num_channels == 4 and not has_adobe_segment(encoded):
        return Kind("CMYK jpeg without Adobe's segment")
    frame = frame_type(encoded)
    if frame is not None and frame not in FRAMES:
        return Kind(f"jpeg of type SOF{frame - 0xC0}", pillow_reads_it=False)
    return None
