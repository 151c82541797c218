"""Tells from its bytes whether a PNG is complete, without decoding it."""

START, END = b"\x89PNG\r\n\x1a\n", b"IEND"
CUT_SHORT = "damaged png image (a chunk ends beyond the file)"


def is_cut_short(image: bytes) -> bool:
    """Returns whether a chunk of a PNG ends beyond its file; False for other data.

    A decoder must not get such a file: nvImageCodec 0.9 first fills as much memory as the chunk claims to have, up to 4 GB.
    """
    if not image.startswith(START):
        return False
    place = len(START)
    while place + 8 <= len(image):
        if image[place + 4 : place + 8] == END:
            return False
        place += 12 + int.from_bytes(image[place : place + 4], "big")
    return place > len(image)
