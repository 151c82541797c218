"""Object stores through fsspec: what is there, and bytes of it; with retries, so that a fault of some seconds stops nothing."""

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import functools
import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CONNECT_SECONDS, READ_SECONDS = 10, 20  # without a connection, and without a byte; then it is a fault like others
PATIENCE_SECONDS = 180.0  # how long faults may follow each other without a byte in between
LONGEST_PAUSE_SECONDS = 5.0
THREADS = 16  # they wait for answers nearly all of the time
# Of a remote tar only headers are asked for: this many bytes a request. It holds the headers of all small members of a sample
# and of the image that follows, so that a sample costs one request; its images, mostly larger, are passed over.
READ_AHEAD = 16 * 1024

LISTED_FROM = 32  # objects of one folder that are looked up with a list rather than one by one

T = TypeVar("T")

log = logging.getLogger(__name__)


class Interruption(Exception):  # noqa: N818  (nothing went wrong)
    """Ends `retrying`, and is passed on as it is."""


class Stopped(Interruption):
    """The caller's event ended the waiting."""


@dataclass(frozen=True)
class RemoteFile:
    """One object.

    Attributes:
        url: Where it is.
        size: Bytes.
        version: A text that changes whenever the content does.
        md5: Of the content, hexadecimal; empty where the store does not give it.
        crc32c: Of the content, base64; empty where the store does not give it.
        etag: Of S3: the MD5 of an object that was uploaded in one part and is not encrypted with a key of its own.
    """

    url: str
    size: int
    version: str
    md5: str = ""
    crc32c: str = ""
    etag: str = ""

    def __str__(self) -> str:
        return self.url


def is_url(location: str) -> bool:
    """Whether it is a URL, as `s3://bucket/prefix` is."""
    return re.match(r"[a-z0-9]+://", location) is not None


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Errors of the libraries for remote storage, of which each has its own kinds, as ours."""
    try:
        yield
    except (Interruption, ValueError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such object, folder or bucket") from error
    except ImportError as error:
        raise ValueError(f"{url}: a package is missing ({error}); pip install 'googlenet-dali[remote]'") from error
    except Exception as error:
        kind = PermissionError if _is_forbidden(error) else OSError
        raise kind(f"{url}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: after broken connections, timeouts, and answers that say so."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # two classes up to Python 3.10
        return True
    never = FileNotFoundError, PermissionError, ImportError, ValueError, TypeError, AttributeError, AssertionError, LookupError
    # The names are botocore's, which is not there for other stores.
    if (
        isinstance(error, never)
        or (isinstance(error, RuntimeError) and not isinstance(error, OSError))
        or _is_forbidden(error)
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
    ):
        return False
    status = _http_status(error)
    return status is None or status < 400 or status in (408, 425, 429) or status >= 500


def warn_once(url: str) -> Callable[[BaseException], None]:
    """Something to tell of faults, which tells the log of the first one."""
    told = threading.Event()

    def on_fault(error: BaseException) -> None:
        if not told.is_set():
            told.set()
            log.warning("%s: trying again after %s", url, describe(error))

    return on_fault


def retrying(
    url: str,
    call: Callable[[], T],
    *,
    stop: threading.Event | None = None,
    on_fault: Callable[[BaseException], None] | None = None,
) -> T:
    """What `call` gives, called again after faults that may pass, with pauses that grow up to five seconds.

    Args:
        url: What to call it in messages.
        call: Asks the store.
        stop: Ends the waiting early.
        on_fault: Is told of each fault after which it is tried again; without it the log is, of the first.

    Raises:
        FileNotFoundError: There is no such object.
        PermissionError: Access is denied.
        ValueError: A package is missing, or something else is wrong that the user can mend.
        OSError: Any other lasting error; or nothing but faults for three minutes; names the last one.
        Stopped: By `stop`.
    """
    stop, on_fault = stop or threading.Event(), on_fault or warn_once(url)
    give_up, pause = time.monotonic() + PATIENCE_SECONDS, 0.2
    while True:
        try:
            return call()
        except Exception as error:
            if isinstance(error, Interruption) or not is_transient(error):
                with storage_errors(url):
                    raise
            if time.monotonic() > give_up:
                raise OSError(
                    f"{url}: nothing but faults for {PATIENCE_SECONDS:.0f} s, the last one {describe(error)}"
                ) from error
            on_fault(error)
        # Drawn at random, lest those that failed together come back together.
        if stop.wait(pause * random.uniform(0.5, 1)):
            raise Stopped
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def stat(
    url: str, *, stop: threading.Event | None = None, on_fault: Callable[[BaseException], None] | None = None
) -> RemoteFile:
    """Size and checksums of an object.

    Raises:
        FileNotFoundError: There is none.
        OSError: As `retrying`.
    """
    return retrying(url, lambda: stat_once(url, stop), stop=stop, on_fault=on_fault)


def stat_once(url: str, stop: threading.Event | None = None) -> RemoteFile:
    """Size and checksums of an object, asked for once; raises whatever the store's library raises."""
    entry = _call(url, "info", stop)
    if entry["type"] != "file":
        raise FileNotFoundError(url)
    return _remote_file(url, entry)


def stat_existing(urls: Iterable[str]) -> list[RemoteFile | None]:
    """Size and checksums of objects; None for those that are not there.

    Many in one folder are listed, a thousand with each answer; one by one is asked for what is in no list.
    """
    urls = list(urls)
    listed = _listed(urls)
    asked = [url for url in urls if url not in listed]
    found = {**listed, **dict(zip(asked, _ask_for_each(asked), strict=True))}
    return [found[url] for url in urls]


def _listed(urls: list[str]) -> dict[str, RemoteFile]:
    """Those of the objects that could be found in lists; of a few in a folder nothing is listed."""
    folders = collections.defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    listed = dict[str, RemoteFile]()
    for folder, within in folders.items():
        # A web server has no lists, and a store may deny them.
        if len(within) >= LISTED_FROM and not folder.startswith(("http://", "https://")):
            with contextlib.suppress(PermissionError):
                prefix = os.path.commonprefix(within)  # noqa: RUF071  (a store lists by characters)
                listed.update((file.url, file) for file in glob_files(f"{prefix}*"))
    return {url: listed[url] for url in urls if url in listed}


def _ask_for_each(urls: list[str]) -> list[RemoteFile | None]:

    def ask(url: str) -> RemoteFile | None:
        try:
            return stat(url)
        except FileNotFoundError:
            return None

    return list(in_threads(ask, urls))


def list_folder(url: str) -> list[RemoteFile]:
    """The objects right below a prefix, by name; none where there is no such prefix or bucket."""
    try:
        entries = retrying(url, lambda: _call(url, "ls", None, detail=True))
    except FileNotFoundError:
        return []
    return _remote_files(url, entries)


def glob_files(pattern: str) -> list[RemoteFile]:
    """The objects that a pattern with `*`, `?` or `[...]` matches, by name."""
    try:
        entries = retrying(pattern, lambda: _call(pattern, "glob", None, detail=True))
    except FileNotFoundError:  # of the bucket
        return []
    return _remote_files(pattern, entries.values())


def read_text(url: str) -> str:
    """The text of a small object.

    Raises:
        FileNotFoundError: There is none.
        OSError: As `retrying`.
    """
    data: bytes = retrying(url, lambda: _call(url, "cat_file", None))
    return data.decode("utf-8", "backslashreplace")


def read_range(url: str, start: int, end: int, stop: threading.Event | None = None) -> bytes:
    """The bytes from `start` up to `end`, asked for once.

    Raises:
        OSError: Other than that many came.
        Exception: Whatever the store's library raises; see `retrying`.
    """
    data: bytes = _call(url, "cat_file", stop, start=start, end=end)
    if len(data) != end - start:
        raise OSError(f"{len(data):,} bytes came where {end - start:,} were asked for, from byte {start:,} on")
    return data


def open_remote(url: str, size: int | None = None) -> BinaryIO:
    """An object to be read here and there, a little at a time, with retries; `size` saves a request."""
    raw = _Ranges(url, stat(url).size if size is None else size)
    return cast(BinaryIO, io.BufferedReader(raw, READ_AHEAD))


class _Ranges(io.RawIOBase):
    """Reads whatever is asked for, and no more, by range requests; counts the bytes in `requested`."""

    def __init__(self, url: str, size: int) -> None:
        self.requested = 0
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if end <= start:
            return 0
        buffer[: end - start] = retrying(self._url, lambda: read_range(self._url, start, end))
        self._position = end
        self.requested += end - start
        return end - start


def in_threads(function: Callable[[Any], T], tasks: list[Any]) -> Iterator[T]:
    """`map` over tasks that wait for a store, in order; an error ends it without waiting for the rest.

    Nor does the process wait for them when it ends, as it would for the threads of a pool.
    """
    results: list[concurrent.futures.Future[T]] = [concurrent.futures.Future() for _ in tasks]
    waiting = iter(list(zip(tasks, results, strict=True)))  # the threads share it: to take the next one is atomic
    stop = threading.Event()

    def work() -> None:
        for task, result in waiting:
            if stop.is_set():
                return
            try:
                result.set_result(function(task))
            except Exception as error:
                result.set_exception(error)

    for _ in range(min(THREADS, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for result in results:
            yield result.result()
    finally:
        stop.set()


def _call(url: str, method: str, stop: threading.Event | None, **options: Any) -> Any:
    """Calls a method of the file system for the URL's path; `stop` ends it at once where the library is asynchronous."""
    files = filesystem(url)
    path = files._strip_protocol(url)
    if not files.async_impl:
        return getattr(files, method)(path, **options)
    future = asyncio.run_coroutine_threadsafe(getattr(files, f"_{method}")(path, **options), files.loop)
    while not concurrent.futures.wait([future], 0.2).done:
        if stop and stop.is_set():
            future.cancel()
            raise Stopped
    return future.result()


def filesystem(url: str) -> "AbstractFileSystem":
    """The file system for a URL, one for all threads, with timeouts, and with as few retries of its own as it can be set to."""
    root = re.match(r"[a-z0-9]+://[^/]*", url)
    assert root, url
    return _filesystem(root.group(), os.getpid())  # it does not work in a forked process


@functools.cache
def _filesystem(root: str, process: int) -> "AbstractFileSystem":
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    # Listings are cached by default, and others write to the store.
    common = {"use_listings_cache": False, "skip_instance_cache": True}
    protocol = root.partition(":")[0]
    if protocol in ("s3", "s3a"):
        # What the user's configuration of fsspec says comes last; it holds addressing styles, proxies and the like.
        config = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 2 * THREADS,
            **conf.get("s3", {}).get("config_kwargs", {}),
        }
        for name in ("botocore", "aiobotocore"):
            _quieten(name, logging.WARNING)  # they say where they found credentials
        files, _ = url_to_fs(root, config_kwargs=config, **common)
        files.retries = 1
        return files
    if protocol in ("gs", "gcs"):
        from aiohttp import ClientTimeout

        # Not `gcsfs.GCSFileSystem`: it asks another service, over gRPC, of which kind a bucket is, before each read if that
        # service denies access, and for a minute where there is none, as with an emulator.
        from gcsfs.core import GCSFileSystem

        _quieten("gcsfs", logging.CRITICAL)  # it logs each error that it raises, with a traceback
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return GCSFileSystem(requests_timeout=timeout, **common)
    return url_to_fs(root, **common)[0]


def _quieten(name: str, level: int) -> None:
    """Sets the level of a library's log where nobody has."""
    library_log = logging.getLogger(name)
    if library_log.level == logging.NOTSET:
        library_log.setLevel(level)


def _remote_files(url: str, entries: Iterable[dict[str, Any]]) -> list[RemoteFile]:
    files = filesystem(url)
    found = [_remote_file(files.unstrip_protocol(entry["name"]), entry) for entry in entries if entry["type"] == "file"]
    return sorted(found, key=lambda file: file.url)


def _remote_file(url: str, entry: dict[str, Any]) -> RemoteFile:
    """From what a file system says of an object, each in its own words."""
    # md5Hash, generation and crc32c are Google's; others have an ETag, or a time of some name.
    etag = str(entry.get("ETag", "")).strip('"')
    names = "generation", "ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created"
    version = next((str(entry[name]) for name in names if entry.get(name)), "")
    return RemoteFile(
        url,
        size=int(entry["size"]),
        version=version,
        md5=base64.b64decode(entry.get("md5Hash", "")).hex(),
        crc32c=entry.get("crc32c", ""),
        etag=etag,
    )


def _is_forbidden(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden:")  # gcsfs has an OSError that says so


def _http_status(error: BaseException) -> int | None:
    """The status of the answer behind an error of s3fs, gcsfs or aiohttp."""
    response = getattr(error.__cause__, "response", None)  # botocore's, of which s3fs makes others
    if isinstance(response, dict) and "HTTPStatusCode" in response.get("ResponseMetadata", {}):
        return int(response["ResponseMetadata"]["HTTPStatusCode"])
    # By name, for others have a code too: a broken connection is 400 for aiohttp.
    attribute = {"HttpError": "code", "ClientResponseError": "status"}.get(type(error).__name__, "")
    status = str(getattr(error, attribute, "")) if attribute else ""
    return int(status) if status.isdigit() else None
