"""How every command starts and ends."""

import io
import sys
from collections.abc import Callable


def run_command(command: Callable[[], int], interrupted: str = "interrupted", *, exits: bool = True) -> None:
    """Runs a command and ends the process. An error becomes one line on stderr.

    The exit status is the one that the command returns; 2 for a `ValueError`, which the user can correct; 1 for an `OSError`
    or a closed pipe; 130 after Ctrl-C.

    Args:
        command: Reads the command line and runs.
        interrupted: Message after Ctrl-C.
        exits: Whether to end the process also on success.
    """
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if exits or status:
        sys.exit(status)
