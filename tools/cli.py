"""What all commands of the tools have in common: how they begin, and how they end."""

import io
import sys
from collections.abc import Callable


def run_command(command: Callable[[], int], interrupted: str = "interrupted") -> None:
    """Runs a command and ends the process: errors are said in one line.

    Exit status: what the command returns; 1 for an error on the way (`OSError`), and without a word where whoever read the
    output has gone; 2 for a mistake of the user's (`ValueError`); 130 if it was interrupted.

    Args:
        command: Reads the command line and does what it says.
        interrupted: What to say then.
    """
    for stream in (sys.stdout, sys.stderr):  # file names need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(command())
    except BrokenPipeError:  # `head`, for one
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
