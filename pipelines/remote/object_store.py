"""Lists and reads object stores through fsspec, with retries."""

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import errno
import functools
import glob
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from pipelines.location import READABLE
from pipelines.remote.retrying import Stopped, http_status, retrying

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CONNECT_SECONDS, READ_SECONDS = 10, 20  # until a connection, and between bytes; after that the request has failed
THREADS = 16  # they spend nearly all of their time waiting
# Bytes per request for the headers of a remote tar. One request covers the headers of a sample's small members and of the image
# that follows. The reader skips the images, which are mostly larger, so a sample costs one request.
READ_AHEAD = 16 * 1024
LISTED_FROM = 32  # from this many objects of one folder on, listing replaces a request per object

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """One object.

    Attributes:
        url: URL.
        size: Size, in bytes.
        version: Text that changes whenever the content does.
        md5: MD5 of the content, hexadecimal; empty if the store does not state it.
        crc32c: CRC32C of the content, base64; empty if the store does not state it.
        etag: S3 ETag: the MD5 of an object that was uploaded in one part and is not encrypted with a customer's key.
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
    """Returns whether a location is a URL such as `s3://bucket/prefix`, not a path."""
    return re.match(r"[a-z0-9]+://", location) is not None


def stat(
    url: str, *, stop: threading.Event | None = None, on_fault: Callable[[BaseException], None] | None = None
) -> RemoteFile:
    """Returns size and checksums of an object.

    Raises:
        FileNotFoundError: The object does not exist.
        OSError: See `retrying`.
    """
    return retrying(url, lambda: stat_once(url, stop), stop=stop, on_fault=on_fault)


def stat_once(url: str, stop: threading.Event | None = None) -> RemoteFile:
    """Returns size and checksums of an object without retrying. Raises whatever the store's library raises."""
    try:
        entry = _call(url, "info", stop)
    except FileNotFoundError as error:
        # fsspec says so of web servers that do not answer or deny access, too.
        if isinstance(error.__cause__, Exception) and _is_web(url) and http_status(error.__cause__) not in (404, 410):
            raise error.__cause__ from None
        raise
    except OSError as error:
        # S3 answers HEAD without a body, which would say why: expired credentials, another key, another time.
        if url.startswith(("s3://", "s3a://")) and (isinstance(error, PermissionError) or error.errno == errno.EINVAL):
            _call(url, "cat_file", stop, start=0, end=1)
        raise
    if entry["type"] != "file":
        raise FileNotFoundError(url)
    return _remote_file(url, entry)


def stat_existing(urls: list[str]) -> list[RemoteFile | None]:
    """Returns size and checksums of objects; `None` for missing ones.

    Many objects of one folder are listed, a thousand per request. The others take a request each.
    """

    def ask(url: str) -> RemoteFile | None:
        try:
            return stat(url)
        except FileNotFoundError:
            return None

    found: dict[str, RemoteFile | None] = {**_listed(urls)}
    missing = [url for url in urls if url not in found]
    found.update(zip(missing, in_threads(ask, missing), strict=True))
    return [found[url] for url in urls]


def _listed(urls: list[str]) -> dict[str, RemoteFile]:
    """Lists the folders of many objects; returns the objects found."""
    folders = collections.defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    listed = dict[str, RemoteFile]()
    for folder, within in folders.items():
        # Web servers have no listings, and a store may deny them.
        if len(within) >= LISTED_FROM and not _is_web(folder):
            with contextlib.suppress(PermissionError):
                prefix = os.path.commonprefix(within)  # noqa: RUF071  (stores list by characters)
                listed.update((file.url, file) for file in glob_files(f"{prefix}*"))
    return {url: listed[url] for url in urls if url in listed}


def list_folder(url: str) -> list[RemoteFile]:
    """Returns the objects directly below a prefix, by name; none if the prefix or the bucket does not exist."""
    return _list(url, "ls")


def glob_files(pattern: str) -> list[RemoteFile]:
    """Returns the objects that match a pattern with `*`, `?` or `[...]`, by name."""
    return _list(pattern, "glob")


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _list(url: str, method: str) -> list[RemoteFile]:
    if _is_web(url) and (method == "ls" or glob.has_magic(url)):
        what = "a URL with a query is not read" if "?" in url else "the folders of a web server cannot be listed"
        raise ValueError(f"{url}: {what}; name the tars themselves, as in http://HOST/FOLDER/x-{{000000..000009}}.tar")
    try:
        found = retrying(url, lambda: _call(url, method, None, detail=True))
    except FileNotFoundError:  # the prefix or the bucket
        return []
    entries = found.values() if isinstance(found, dict) else found
    to_url = filesystem(url).unstrip_protocol
    files = [_remote_file(to_url(entry["name"]), entry) for entry in entries if entry["type"] == "file"]
    return sorted(files, key=lambda file: file.url)


def read_existing(url: str) -> bytes | None:
    """Reads a small object; returns `None` if it does not exist.

    Raises:
        OSError: See `retrying`.
    """
    try:
        data: bytes = retrying(url, lambda: _call(url, "cat_file", None))
    except (FileNotFoundError, PermissionError):  # without permission to list, S3 denies access to missing objects
        return None
    return data


def read_text(url: str) -> str | None:
    """Reads the text of a small object like `read_existing`."""
    data = read_existing(url)
    return None if data is None else data.decode("utf-8", "backslashreplace")


def read_range(url: str, start: int, end: int, stop: threading.Event | None = None) -> bytes:
    """Reads the bytes from `start` up to `end` without retrying.

    Raises:
        OSError: The answer is shorter.
        ValueError: The server sends more than it was asked for.
        Exception: Whatever the store's library raises; see `retrying`.
    """
    data: bytes = _call(url, "cat_file", stop, start=start, end=end)
    if len(data) > end - start:  # HTTP allows a server to ignore ranges
        raise ValueError(
            f"{url}: the server answered a request for {end - start:,} bytes with {len(data):,}: it does not support range "
            "requests; copy the shards to a local folder"
        )
    if len(data) != end - start:
        raise OSError(f"received {len(data):,} bytes instead of {end - start:,}, from byte {start:,} on")
    return data


def open_remote(url: str, size: int | None = None) -> BinaryIO:
    """Opens an object for small reads at arbitrary offsets, with retries. Passing `size` saves a request."""
    raw = _Ranges(url, stat(url).size if size is None else size)
    return cast(BinaryIO, io.BufferedReader(raw, READ_AHEAD))


class _Ranges(io.RawIOBase):
    """Turns each read into one range request; `requested` counts the bytes."""

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
    """Maps a function that waits for a store over tasks, in order. An error ends the iteration at once.

    The threads are daemons: unlike those of a pool, they never delay the end of the process.
    """
    results: list[concurrent.futures.Future[T]] = [concurrent.futures.Future() for _ in tasks]
    waiting = iter(list(zip(tasks, results, strict=True)))  # shared by the threads; taking the next entry is atomic
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
    """Calls a method of the URL's file system. With asynchronous libraries `stop` interrupts the call."""
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
    """Returns the file system of a URL, shared by all threads, with timeouts and as few retries of its own as possible.

    Raises:
        ValueError: The URL is incomplete, or of a kind that fsspec does not know.
    """
    root = re.match(r"[a-z0-9]+://[^/]+", url)
    if not root:
        raise ValueError(f"{url if '://' in url else f'{url}//'}: the name of a bucket or server is missing after ://")
    return _filesystem(root.group(), os.getpid())  # it does not work in a forked process


@functools.cache
def _filesystem(root: str, process: int) -> "AbstractFileSystem":
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    # By default fsspec caches listings, but others write to the store.
    common = {"use_listings_cache": False, "skip_instance_cache": True}
    protocol = root.partition(":")[0]
    if protocol in ("s3", "s3a"):
        # The user's fsspec configuration takes precedence: it holds addressing styles, proxies and the like.
        config = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 2 * THREADS,
            **conf.get("s3", {}).get("config_kwargs", {}),
        }
        for name in ("botocore", "aiobotocore"):
            _quieten(name, logging.WARNING)  # they log where they found credentials
        files, _ = url_to_fs(root, config_kwargs=config, **common)
        files.retries = 1
        return files
    if protocol in ("gs", "gcs"):
        from aiohttp import ClientTimeout

        # Not `gcsfs.GCSFileSystem`: it asks another service for the kind of the bucket, over gRPC. It does so before each read
        # if that service denies access, and waits a minute if there is no such service, as with an emulator.
        from gcsfs.core import GCSFileSystem

        _quieten("gcsfs", logging.CRITICAL)  # it logs each error that it raises, with a traceback
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return GCSFileSystem(requests_timeout=timeout, **common)
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return url_to_fs(root, client_kwargs={"timeout": timeout}, **common)[0]
    try:
        return url_to_fs(root, **common)[0]
    except (ValueError, TypeError, AttributeError, IsADirectoryError) as error:  # unknown, or it needs more than a URL
        raise ValueError(f"{root}: this kind of URL is not read; {READABLE} are") from error


def _quieten(name: str, level: int) -> None:
    """Sets the level of a library's logger, unless the user has set one."""
    library_log = logging.getLogger(name)
    if library_log.level == logging.NOTSET:
        library_log.setLevel(level)


def _remote_file(url: str, entry: dict[str, Any]) -> RemoteFile:
    """Builds a `RemoteFile` from an fsspec entry, whose keys depend on the store."""
    # Google has md5Hash, generation and crc32c. Others have an ETag, or a time under one of these names.
    if entry["size"] is None:
        raise ValueError(f"{url}: the server does not state its size; copy the shards to a local folder")
    names = "generation", "ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created"
    return RemoteFile(
        url,
        size=int(entry["size"]),
        version=next((str(entry[name]) for name in names if entry.get(name)), ""),
        md5=base64.b64decode(entry.get("md5Hash", "")).hex(),
        crc32c=entry.get("crc32c", ""),
        etag=str(entry.get("ETag", "")).strip('"'),
    )
