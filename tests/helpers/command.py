"""Runs commands in the process of the test."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch


class Done(NamedTuple):
    """The exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


def run_main(main: Callable[[Sequence[str]], None], *arguments: object) -> Done:
    """Runs the `main` of a command line."""
    with (
        _unchanged_process(),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as exit_,
    ):
        main([*map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return Done(exit_.value.code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restores the log handlers and torch's threads, which commands set for their process."""
    handlers, level, threads = logging.root.handlers[:], logging.root.level, torch.get_num_threads()
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        torch.set_num_threads(threads)
