"""Whether the training decoder can decode an image, asked outside of a pipeline."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence

# nvImageCodec logs each image that it cannot decode to the standard error; here that is a result, not an accident.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

# The names of nvImageCodec's codecs, and the extension that the pipeline's reader looks for.
EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tiff": "tif",
    "jpeg2k": "jp2",
    "pnm": "ppm",
}


def cpu_decoder(num_threads: int = 1) -> nvimgcodec.Decoder:
    """The decoder of DALI's CPU backend; needs no driver."""
    # Without the list of backends the decoder asks for a CUDA device, also when told to do without.
    return nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        max_num_cpu_threads=num_threads,
    )


def parse_header(encoded: bytes) -> nvimgcodec.CodeStream | None:
    """The image as nvImageCodec sees it, or None for bytes that training cannot make out."""
    try:
        stream = nvimgcodec.CodeStream(encoded)
        return stream if stream.codec_name in EXTENSIONS else None
    except RuntimeError:  # what it raises for bytes that it cannot make out
        return None


def why_undecodable(images: Sequence[bytes]) -> list[str]:
    """For each image, given as the bytes of its file, why it cannot be decoded completely, or an empty text."""
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
    """Without the lines that libjpeg and libpng write to the process's standard error; several threads may be inside."""
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
