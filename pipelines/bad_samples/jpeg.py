"""Tells whether a JPEG is complete from its bytes, without decoding it."""

START, END = b"\xff\xd8\xff", b"\xff\xd9"  # ITU-T T.81, table B.1: start of image and the next marker; end of image
START_OF_SCAN, WITHOUT_LENGTH = 0xDA, {0x01, *range(0xD0, 0xD9)}  # the latter markers have no length field
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


def _start_of_scan(image: bytes) -> int:
    """Returns the offset of the compressed pixels, or the length of the image if the headers do not reach them."""
    place = 2
    while place + 4 <= len(image) and image[place] == 0xFF:
        marker = image[place + 1]
        if marker == START_OF_SCAN:
            return place
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    return len(image)
