"""Keeps what decoders write themselves out of the terminal."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

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


def end_silence() -> None:
    """Restores standard error in a process that is about to end, for its last words."""
    if _num_silencing:  # without the lock, which a blocked thread may hold
        os.dup2(_stderr, 2)
