"""Limits on what an image may take: pixels, before memory for them is allocated, and time."""

# Pillow's `Image.MAX_IMAGE_PIXELS`: a quarter of a GiB in 24-bit pixels, about 9,459 x 9,459. Photos have up to 61 million
# pixels, and a file of some kilobytes can declare billions.
MAX_PIXELS = 89_478_485
# Longer than an NFS client tries before it reports that a server does not respond (nfs(5): timeo=600 and retrans=2 are three
# minutes), and shorter than the ten minutes after which the other ranks give up a collective operation of NCCL.
TIMEOUT_SECONDS = 300.0


def too_many_pixels(width: int, height: int, max_pixels: int, option: str = "--max-pixels") -> str:
    """Returns why an image is too large, or an empty text if it is not. `option` is the flag that sets the limit."""
    width, height = width % 2**32, height % 2**32  # nvImageCodec takes the sides of a TIFF or BMP for signed numbers
    if width * height <= max_pixels:
        return ""
    return f"{width}x{height} pixels, more than the limit of {max_pixels:,} ({option})"


def check_max_pixels(max_pixels: int, option: str = "--max-pixels") -> None:
    """Raises ValueError for a limit at which the loader's own placeholders for bad samples (8x8) would be too large."""
    if max_pixels < 64:
        raise ValueError(f"{option} {max_pixels}: at least 64 is needed")
