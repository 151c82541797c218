"""Tells whether an image file is complete from its bytes, without decoding it."""

from pipelines.bad_samples import jpeg, png


def why_cut_short(image: bytes) -> str:
    """Returns what is wrong with a JPEG or a PNG whose end is missing, or an empty text. Other formats are not judged.

    Args:
        image: Content of a file.
    """
    if jpeg.is_cut_short(image):
        return jpeg.CUT_SHORT
    return png.CUT_SHORT if png.is_cut_short(image) else ""
