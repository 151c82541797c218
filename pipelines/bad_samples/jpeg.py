"""Tells from its bytes whether a JPEG is complete, and of which kind it is, without decoding it."""

from collections.abc import Iterator

START, END = b"\xff\xd8\xff", b"\xff\xd9"  # ITU-T T.81, table B.1: start of image and the next marker; end of image
START_OF_SCAN, WITHOUT_LENGTH = 0xDA, {0x01, *range(0xD0, 0xD9)}  # the latter markers have no length field
NO_FRAMES = {0xC4, 0xC8, 0xCC}  # Huffman tables, reserved, arithmetic conditioning
CUT_SHORT = "jpeg image cut short"


def is_cut_short(image: bytes) -> bool:
    """Whether the end-of-image marker is missing. False for anything but a JPEG.

    Decoders differ here. libjpeg-turbo fails where the bytes end, but not if its crop ends before that, or if padding follows.
    NVIDIA's hardware decoder reports every image as decoded.

    Args:
        image: Content of a file, `bytes` or `bytearray`.
    """
    if image.endswith(END) or not image.startswith(START):
        return False
    # Some cameras and editors append bytes of their own. An embedded preview before the pixels has an end of its own.
    return image.rfind(END, _start_of_scan(image)) < 0


def frame_type(image: bytes) -> int | None:
    """Returns the marker of a JPEG's frame (0xC0: SOF0, baseline, and so on), or None if there is none before the pixels."""
    return next((marker for marker, _ in _segments(image) if 0xC0 <= marker <= 0xCF and marker not in NO_FRAMES), None)


def has_adobe_segment(image: bytes) -> bool:
    """Whether a JPEG has Adobe's segment, which says how its colors are stored."""
    return any(marker == 0xEE and image[place + 4 : place + 9] == b"Adobe" for marker, place in _segments(image))


def _start_of_scan(image: bytes) -> int:
    """Returns the offset of the compressed pixels, or the length of the image if the headers do not reach them."""
    return next((place for marker, place in _segments(image) if marker == START_OF_SCAN), len(image))


def _segments(image: bytes) -> Iterator[tuple[int, int]]:
    """Yields marker and offset of each segment, up to the first scan."""
    place, marker = 2, 0
    while marker != START_OF_SCAN and place + 4 <= len(image) and image[place] == 0xFF:
        marker = image[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in WITHOUT_LENGTH:
            place += 2
        else:
            yield marker, place
            place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
