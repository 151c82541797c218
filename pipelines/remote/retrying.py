"""Retries requests to an object store, and translates the errors of its libraries."""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipelines.location import READABLE, URL_SCHEMES

PATIENCE_SECONDS = 180.0  # how long a request may fail before it is given up
LONGEST_PAUSE_SECONDS = 5.0
# Errors of botocore, by name, because it is not installed for other stores.
LACK_OF_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
WRONG_SETTINGS = (*LACK_OF_CREDENTIALS, "ConfigParseError", "ParamValidationError", "ProfileNotFound")
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket FSSPEC_S3='{\"anon\": true}'"

T = TypeVar("T")

log = logging.getLogger(__name__)


class Interruption(Exception):  # noqa: N818  (not an error)
    """Ends `retrying`, which passes it on unchanged."""


class Stopped(Interruption):
    """The caller's event ended the wait."""


def retrying(
    url: str,
    call: Callable[[], T],
    *,
    stop: threading.Event | None = None,
    on_fault: Callable[[BaseException], None] | None = None,
) -> T:
    """Returns the result of `call`, which is repeated after transient errors, with pauses that grow to five seconds.

    Args:
        url: URL for messages.
        call: Sends the request.
        stop: Ends the wait early.
        on_fault: Receives each transient error; the default logs the first one.

    Raises:
        FileNotFoundError: The object does not exist.
        PermissionError: Access is denied.
        ValueError: A package is missing, or the user can correct something else.
        OSError: Another permanent error, or only transient errors for three minutes.
        Stopped: `stop` was set.
    """
    stop, on_fault = stop or threading.Event(), on_fault or warn_once(url)
    give_up, pause = time.monotonic() + PATIENCE_SECONDS, 0.2
    while True:
        try:
            return call()
        except Exception as error:
            if isinstance(error, Interruption) or not _is_transient(error):
                with storage_errors(url):
                    raise
            if time.monotonic() > give_up:
                raise OSError(f"{url}: only errors for {PATIENCE_SECONDS:.0f} s; the last one: {_describe(error)}") from error
            on_fault(error)
        # The random factor keeps requests that failed together from returning together.
        if stop.wait(pause * random.uniform(0.5, 1)):
            raise Stopped
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def warn_once(url: str) -> Callable[[BaseException], None]:
    """Returns an `on_fault` that logs the first error only."""
    told = threading.Event()

    def on_fault(error: BaseException) -> None:
        if not told.is_set():
            told.set()
            log.warning("%s: retrying after an error: %s", url, _describe(error))

    return on_fault


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Translates the errors of the storage libraries, which each have their own kinds, to `OSError` and `ValueError`."""
    try:
        yield
    except Interruption:
        raise
    except ValueError as error:
        if str(error).startswith(f"{url.partition(':')[0]}:"):
            raise
        raise ValueError(f"{url}: {_describe(error)}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such object, folder or bucket") from error
    except ImportError as error:
        scheme = url.partition(":")[0]
        way_out = "pip install -e '.[remote]'" if scheme in URL_SCHEMES else f"{READABLE} are read without it"
        raise ValueError(f"{url}: a package is missing ({error}); {way_out}") from error
    except Exception as error:
        kind = PermissionError if _is_forbidden(error) else OSError
        way_out = f"; set {CREDENTIALS}" if type(error).__name__ in LACK_OF_CREDENTIALS else ""
        raise kind(f"{url}: {_describe(error)}{way_out}") from error


def _describe(error: BaseException) -> str:
    """Formats an error as one line, with its kind if its text is no more than a word."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__}: {text}".rstrip(": ")


def _is_transient(error: BaseException) -> bool:
    """Returns whether the same request may succeed later: after broken connections, timeouts, and statuses that say so."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # two classes in Python 3.10
        return True
    never = FileNotFoundError, PermissionError, ImportError, ValueError, TypeError, AttributeError, AssertionError, LookupError
    if (
        isinstance(error, never)
        or (isinstance(error, RuntimeError) and not isinstance(error, OSError))
        or _is_forbidden(error)
        or type(error).__name__ in WRONG_SETTINGS
    ):
        return False
    status = http_status(error)
    return status is None or status < 400 or status in (408, 425, 429) or status >= 500


def _is_forbidden(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden:")  # gcsfs raises an OSError with this text


def http_status(error: BaseException) -> int | None:
    """Returns the HTTP status behind an error of s3fs, gcsfs or aiohttp, if any."""
    response = getattr(error.__cause__, "response", None)  # s3fs wraps botocore's error
    if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
        return int(response["ResponseMetadata"]["HTTPStatusCode"])
    # By name, because other errors have a code as well: aiohttp gives a broken connection the code 400.
    attribute = {"HttpError": "code", "ClientResponseError": "status"}.get(type(error).__name__, "")
    status = str(getattr(error, attribute, "")) if attribute else ""
    return int(status) if status.isdigit() else None
