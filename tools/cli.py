"""How every command starts and ends."""

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from pipelines.location import expand_arguments
from pipelines.printable import printable, printable_text

SHORT_SPIN = "3000"  # turns: as fast as the default on a quiet machine, and faster on a busy one


def command_line(arguments: Sequence[str] | None) -> list[str]:
    """Returns the words of the command line, or those given, with `~` and `file:` resolved in all of them.

    Raises:
        ValueError: A `file:` URL is malformed.
    """
    return expand_arguments(list(sys.argv[1:] if arguments is None else arguments))


class LogLines(logging.Formatter):
    """Formats log lines without the control characters that names from files may have."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_text(super().format(record))


def log_to(stream: TextIO) -> None:
    """Sends the log lines of this process to a stream."""
    logging.basicConfig(level=logging.INFO, stream=stream, force=True)
    for handler in logging.root.handlers:
        handler.setFormatter(LogLines("%(message)s"))


def check_output(option: str, path: Path) -> None:
    """Checks the file that an option names for output, before long work.

    Raises:
        ValueError: Its folder does not exist, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"{option} {path}: a folder; name a file in it")


def reason_of(error: OSError) -> str:
    """Returns the message of an error of the system without its number, with its files first as in other messages."""
    text = str(error)
    if not text.startswith(f"[Errno {error.errno}] "):  # a message of the project, or of a library
        return text
    files = [printable(str(file)) for file in (error.filename, error.filename2) if file is not None]
    return ": ".join([*([" -> ".join(files)] if files else []), str(error.strerror)])


def _choose_how_threads_wait() -> None:
    """Sets how the threads of OpenMP, which torch uses on a CPU, wait for each other. The settings of the user come first.

    By default they spin for milliseconds: a core works for nothing while another thread of the same step waits for a core that
    some other program has. OpenMP reads the setting when torch is imported. tools/considerate.py shortens the spinning further
    while there are such programs. docs/performance.md has the measurements.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & {*os.environ}:
        os.environ["GOMP_SPINCOUNT"] = SHORT_SPIN


def run_command(command: Callable[[], int], interrupted: str = "interrupted", *, exits: bool = True) -> None:
    """Runs a command and ends the process. An error becomes one line on stderr.

    The exit status is the one that the command returns; 2 for a `ValueError`, which the user can correct; 1 for an `OSError`
    or a closed pipe; 130 after Ctrl-C.

    Args:
        command: Reads the command line and runs.
        interrupted: Message after Ctrl-C.
        exits: Whether to end the process also on success.
    """
    _choose_how_threads_wait()
    for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = command()
    except BrokenPipeError:  # the reader of the output has gone, for example `head`
        sys.exit(1)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(printable_text(f"error: {reason_of(error)}"), file=sys.stderr)
        sys.exit(1)
    if exits or status:
        sys.exit(status)
