"""Tells, outside of a pipeline, whether the training decoder can decode an image."""

import os
from collections.abc import Callable, Sequence

# nvImageCodec logs each image that it cannot decode to standard error. Here that is a result, not an accident.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

from pipelines.bad_samples import png
from pipelines.bad_samples.kinds import JPEG_2000, Kind, misread_kind, why_unknown, why_unsafe
from pipelines.bad_samples.limits import too_many_pixels
from pipelines.bad_samples.silence import decoders_silenced

# nvImageCodec's names of codecs, and the extensions that the reader looks for.
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp", "tiff": "tif", "pnm": "ppm"}


def cpu_decoder(num_threads: int = 1) -> nvimgcodec.Decoder:
    """Returns the decoder of DALI's CPU backend. It needs no driver."""
    # Without the list of backends the decoder asks for a CUDA device, even if it is told to do without.
    return nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        max_num_cpu_threads=num_threads,
    )


def parse_header(encoded: bytes) -> nvimgcodec.CodeStream | None:
    """Returns the image as nvImageCodec sees it, or None for bytes that training cannot read.

    It must not see JPEG 2000 and PNGs that are cut short, see `why_unsafe` and `png.is_cut_short`.
    """
    if encoded.startswith(JPEG_2000) or png.is_cut_short(encoded):
        return None
    try:
        stream = nvimgcodec.CodeStream(encoded)
        return stream if stream.codec_name in EXTENSIONS else None
    except RuntimeError:  # raised for unknown formats
        return None


def why_unusable(encoded: bytes, max_pixels: int, option: str = "--max-pixels") -> str:
    """Returns why training must not get an image, as far as its header tells, or an empty text.

    Args:
        encoded: Content of its file.
        max_pixels: It may have this many pixels at most.
        option: Flag that sets the limit, for messages.
    """
    if unsafe := why_unsafe(encoded):
        return unsafe
    stream = parse_header(encoded)
    if stream is None:
        return why_unknown(encoded)
    kind = misread_kind(stream, encoded)
    return kind.reason if kind else too_many_pixels(stream.width, stream.height, max_pixels, option)


def decode_whole(decoder: nvimgcodec.Decoder, streams: Sequence[nvimgcodec.CodeStream]) -> list[nvimgcodec.Image | None]:
    """Decodes images as a pipeline would that needs all of their pixels. Damaged ones give None."""
    # A pipeline decodes parts of images. For a BMP, nvImageCodec has a stricter decoder for that than for whole images.
    parts = [
        stream.get_sub_code_stream(region=nvimgcodec.Region(0, 0, stream.height, stream.width))
        if stream.codec_name == "bmp" and stream.height * stream.width
        else stream
        for stream in streams
    ]
    with decoders_silenced():
        return list(decoder.decode(parts)) if parts else []


def undecodable(
    images: Sequence[bytes], stops: Callable[[Sequence[int]], bool], max_pixels: int, option: str
) -> dict[int, str]:
    """Finds images at which a pipeline stopped: those with damage, or if there are none, those at which it stops again.

    If there are others than those with damage, the pipeline stops again without them. An image is decoded once, and presented
    to the pipeline 2 + 2 log2(N) times at most, where N is the number of images.

    Args:
        images: Encoded images.
        stops: Tells whether a pipeline stops if it gets these images only, by their indices.
        max_pixels: Images may have this many pixels at most.
        option: Flag that sets the limit, for messages.

    Returns:
        Indices of the images, and what is wrong with each. Empty if the pipeline does not stop at them.
    """
    decoder = cpu_decoder()
    found = {}
    for i, encoded in enumerate(images):  # one at a time: together, large images need much memory
        if reason := _why_undecodable(encoded, decoder, max_pixels, option):
            found[i] = reason
    for i in [] if found else _stopping(range(len(images)), stops):  # if it stops without those found, it is asked again
        kind = _kind(images[i])
        found[i] = f"{kind.name}, which the pipeline cannot decode" if kind else "the pipeline cannot decode it"
    return found


def _why_undecodable(encoded: bytes, decoder: nvimgcodec.Decoder, max_pixels: int, option: str) -> str:
    stream = parse_header(encoded)
    if stream is None:
        return why_unknown(encoded)
    if unsafe := why_unsafe(encoded):
        return unsafe
    too_many = too_many_pixels(stream.width, stream.height, max_pixels, option)
    if too_many or decode_whole(decoder, [stream])[0] is not None:
        return too_many
    kind = misread_kind(stream, encoded)
    return f"{kind.name}, which the pipeline cannot decode" if kind else f"damaged {stream.codec_name} image"


def _kind(encoded: bytes) -> Kind | None:
    stream = parse_header(encoded)
    return None if stream is None else misread_kind(stream, encoded)


def _stopping(images: Sequence[int], stops: Callable[[Sequence[int]], bool]) -> list[int]:
    """Returns the images at which a pipeline stops. If it stops at several together only, that is the last one of them."""
    if not images or not stops(images):
        return []
    found = _stopping_alone(images, stops)
    if found:
        return found
    enough, too_few = len(images), 1  # the pipeline stops at that many of the first images, and not at that many
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        enough, too_few = (middle, too_few) if stops(images[:middle]) else (enough, middle)
    return [images[enough - 1]]


def _stopping_alone(images: Sequence[int], stops: Callable[[Sequence[int]], bool]) -> list[int]:
    """Returns those of the images at which a pipeline stops alone, given that it stops at all together."""
    if len(images) == 1:
        return list(images)
    halves = images[: len(images) // 2], images[len(images) // 2 :]
    return [i for half in halves if stops(half) for i in _stopping_alone(half, stops)]
