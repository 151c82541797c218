"""Tells, outside of a pipeline, whether the training decoder can decode an image."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

# nvImageCodec logs each image that it cannot decode to standard error. Here that is a result, not an accident.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

# nvImageCodec's names of codecs, and the extensions that the reader looks for.
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp", "tiff": "tif", "jpeg2k": "jp2", "pnm": "ppm"}


def cpu_decoder(num_threads: int = 1) -> nvimgcodec.Decoder:
    """Returns the decoder of DALI's CPU backend. It needs no driver."""
    # Without the list of backends the decoder asks for a CUDA device, even if it is told to do without.
    return nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        max_num_cpu_threads=num_threads,
    )


def parse_header(encoded: bytes) -> nvimgcodec.CodeStream | None:
    """Returns the image as nvImageCodec sees it, or None for bytes that training cannot read."""
    try:
        stream = nvimgcodec.CodeStream(encoded)
        return stream if stream.codec_name in EXTENSIONS else None
    except RuntimeError:  # raised for unknown formats
        return None


def undecodable(images: Sequence[bytes], stops_alone: Callable[[int], bool]) -> dict[int, str]:
    """Finds the images at which a pipeline stopped, by decoding each one completely.

    Args:
        images: Encoded images.
        stops_alone: Tells whether a pipeline stops at one image alone, by its index. Called if every image can be decoded.

    Returns:
        Indices of the images, and what is wrong with each.
    """
    found = {i: reason for i, reason in enumerate(_why_undecodable(images)) if reason}
    return found or dict.fromkeys(filter(stops_alone, range(len(images))), "the pipeline cannot decode it")


def _why_undecodable(images: Sequence[bytes]) -> list[str]:
    streams = [parse_header(encoded) for encoded in images]
    with decoders_silenced():
        decoded = iter(cpu_decoder().decode([stream for stream in streams if stream is not None]))
    reasons = []
    for stream, encoded in zip(streams, images, strict=True):
        if stream is None:
            reasons.append("not an image" if encoded else "empty file")
        else:
            reasons.append(f"damaged {stream.codec_name} image" if next(decoded) is None else "")
    return reasons


_silence = threading.Lock()
_num_silencing = 0
_stderr = -1


@contextlib.contextmanager
def decoders_silenced() -> Iterator[None]:
    """Drops what libjpeg and libpng write to the process's standard error. Several threads may be inside."""
    global _num_silencing, _stderr
    with _silence:
        if not _num_silencing:
            sys.stderr.flush()
            _stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
        _num_silencing += 1
    try:
        yield
    finally:
        with _silence:
            _num_silencing -= 1
            if not _num_silencing:
                os.dup2(_stderr, 2)
                os.close(_stderr)
