"""Local copies of remote shards are complete, correct, unique and bounded, despite faults of network, store and processes."""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.files import close_locked, open_locked
from pipelines.remote import object_store as remote
from pipelines.remote import retrying, transfer
from pipelines.remote.cache import ShardCache, open_cache
from tests.helpers.faults import Fault, FaultyProxy

CHUNK = 100_000
SIZE = 450_000  # bytes per shard: five requests
Shards = list[tuple[str, int]]

# Another process: holds shards, prints their copies, and keeps holding them until its input ends.
PROCESS = """
import sys
from pathlib import Path
from pipelines.remote import cache, transfer
transfer.CHUNK_BYTES = 100_000
folder, max_bytes, *urls = sys.argv[1:]
shards = [(url, 450_000) for url in urls]
with cache.ShardCache(Path(folder), int(max_bytes)).hold(shards) as copies:
    print(*copies, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK)


def content(url: str, version: int = 0) -> bytes:
    return random.Random(f"{url} {version}").randbytes(SIZE)


def put(url: str, version: int = 0) -> None:
    files = remote.filesystem(url)
    files.pipe_file(files._strip_protocol(url), content(url, version))


def upload(bucket: str, folder: str, count: int) -> Shards:
    urls = [f"{bucket}/{folder}/x-{i}.tar" for i in range(count)]
    for url in urls:
        put(url)
    return [(url, SIZE) for url in urls]


@contextlib.contextmanager
def opened(folder: Path, shards: float = 100, threads: int = 4, timeout: float = 300) -> Iterator[ShardCache]:
    """Opens a cache with room for this many shards."""
    with contextlib.closing(ShardCache(folder, int(shards * SIZE), threads, timeout)) as cache:
        yield cache


def check_copies(copies: list[Path], shards: Shards, version: int = 0) -> None:
    assert [path.read_bytes() == content(url, version) for path, (url, _) in zip(copies, shards, strict=True)] == [True] * len(
        shards
    )


def copied(folder: Path, suffix: str = "tar") -> set[str]:
    """Returns the shards with a copy (or, by suffix, a partial copy) in the folder."""
    return {path.name.split(".")[0] for path in folder.glob(f"*.{suffix}")}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(folder: Path, max_bytes: int, urls: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROCESS, str(folder), str(max_bytes), *urls]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


CHUNKS = [(start, min(CHUNK, SIZE - start)) for start in range(0, SIZE, CHUNK)]


@pytest.mark.parametrize("store", ["s3_bucket", "gcs_bucket"])
def test_copies_are_whole_and_kept(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    shards = upload(request.getfixturevalue(store), "kept", 5)
    for _ in range(2):
        with opened(tmp_path / "new" / "cache") as cache, cache.hold(reversed(shards)) as copies:
            check_copies(copies, shards[::-1])
            times = [path.stat().st_ino for path in copies]
    with opened(tmp_path / "new" / "cache") as cache, cache.hold(shards) as copies:
        assert [path.stat().st_ino for path in copies] == times[::-1]  # the same files, not new ones
        assert not list((tmp_path / "new" / "cache").glob("*.part"))


def test_each_byte_is_requested_once(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "once", 3)
    with opened(tmp_path) as cache:
        for _ in range(2):
            cache.prefetch(shards[:2])
            with cache.hold(shards) as copies:
                check_copies(copies, shards)
    with opened(tmp_path) as cache, cache.hold(shards):
        pass
    for i in range(3):
        assert faulty.bytes_of(f"once/x-{i}.tar") == CHUNKS


def test_faults_are_survived(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    """The first request for each chunk fails in a different way. Chunks that have arrived are not requested again."""
    shards = upload(s3_bucket, "faults", 2)
    faults: dict[tuple[str, int], list[Fault]] = {}
    kinds: list[Fault] = ["reset", "503", "cut", "short", "500"]

    def fault(method: str, path: str, start: int) -> Fault | None:
        left = faults.setdefault((path, start), [kinds[start // CHUNK % 5]] if start >= 0 else ["503"])
        return left.pop() if left else None

    faulty.fault = fault
    with opened(tmp_path) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards)
    assert {request.fault for request in faulty.requests} == {"", *kinds}
    for i in range(2):
        assert faulty.bytes_of(f"faults/x-{i}.tar") == CHUNKS
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(text.split(": ")[0] for text in warnings) == [url for url, _ in shards]


def test_a_server_that_goes_away_and_comes_back(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "away", 3)

    def come_and_go() -> None:
        wait_until(lambda: sum(request.start >= 0 for request in faulty.requests) >= 4)
        faulty.go_away()
        time.sleep(2)
        faulty.come_back()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    with opened(tmp_path) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards)
    thread.join()
    for i in range(3):
        assert faulty.bytes_of(f"away/x-{i}.tar") == CHUNKS


def test_a_server_that_hangs(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = upload(s3_bucket, "hangs", 1)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.5)
    monkeypatch.setattr(remote, "_filesystem", functools.cache(remote._filesystem.__wrapped__))
    hangs: list[Fault] = ["hang"]
    faulty.fault = lambda method, path, start: hangs.pop() if start == CHUNK and hangs else None
    with opened(tmp_path) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards)
    assert not hangs


def test_giving_up(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    [shard] = upload(s3_bucket, "gone", 1)
    monkeypatch.setattr(retrying, "PATIENCE_SECONDS", 1.0)
    faulty.fault = lambda method, path, start: "503" if start > 0 else None
    with opened(tmp_path) as cache:
        with pytest.raises(OSError, match=rf"^{shard[0]}: only errors for 1 s; the last one: .*reduce your request rate"):
            cache.hold([shard]).__enter__()
        faulty.fault = lambda method, path, start: None
        with cache.hold([shard]) as copies:  # a later attempt succeeds
            check_copies(copies, [shard])


def test_permanent_errors_fail_at_once(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "never", 2)
    missing = f"{s3_bucket}/never/y.tar"
    with opened(tmp_path) as cache:
        cache.prefetch([(missing, SIZE)])
        with pytest.raises(FileNotFoundError, match=f"^{missing}: no such object"):
            cache.hold([*shards, (missing, SIZE)]).__enter__()
        assert len([request for request in faulty.requests if "y.tar" in request.path]) <= 4  # two per attempt: object, folder
        faulty.fault = lambda method, path, start: "403" if start == 0 else None
        put(shards[0][0], 1)
        with opened(tmp_path / "b") as other, pytest.raises(PermissionError, match=rf"^{shards[0][0]}: .*Denied"):
            other.hold(shards[:1]).__enter__()
        assert sum(request.fault == "403" for request in faulty.requests) == 1


def test_a_killed_process_is_resumed(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    """A process that waits for the copy resumes it."""
    shards = upload(s3_bucket, "killed", 1)
    faulty.fault = lambda method, path, start: "hang" if start == 3 * CHUNK and not faulty.released.is_set() else None
    process = start(tmp_path, 10 * SIZE, [shards[0][0]])
    wait_until(lambda: any(path.stat().st_size == 3 * CHUNK for path in tmp_path.glob("*.part")))
    with opened(tmp_path) as cache:
        cache.prefetch(shards)
        wait_until(lambda: any(r.method == "HEAD" for r in faulty.requests[4:]))
        faulty.fault = lambda method, path, start: None
        process.kill()
        process.communicate()
        with cache.hold(shards) as copies:
            check_copies(copies, shards)
    assert faulty.bytes_of("x-0.tar") == CHUNKS


def test_two_processes_share_the_work(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "shared", 6)
    urls = [url for url, _ in shards]
    processes = [start(tmp_path, 10 * SIZE, urls), start(tmp_path, 10 * SIZE, urls)]
    copies = [[Path(path) for path in end(process).split()] for process in processes]
    check_copies(copies[0], shards)
    assert copies[0] == copies[1]
    for i in range(6):
        assert faulty.bytes_of(f"shared/x-{i}.tar") == CHUNKS


def test_least_recently_used_copies_are_deleted_first(tmp_path: Path, s3_bucket: str) -> None:
    shards = upload(s3_bucket, "lru", 5)
    with opened(tmp_path, shards=3) as cache:
        for i in (0, 1, 2, 0):
            with cache.hold([shards[i]]):
                time.sleep(0.01)
        with cache.hold([shards[2]]) as copies:
            with cache.hold([shards[3]]):
                assert copied(tmp_path) == {"x-0", "x-2", "x-3"}
            with cache.hold([shards[4], shards[1]]):
                assert copied(tmp_path) == {"x-1", "x-2", "x-4"}  # 2 is older than 3, but held
                check_copies(copies, [shards[2]])


def test_the_folder_never_holds_more(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    """Two readers go over ten shards, two at a time and two ahead, in a folder with room for four and a half."""
    shards = upload(s3_bucket, "bound", 10)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))

    def read(offset: int) -> None:
        order = shards[offset:] + shards[:offset]
        with opened(tmp_path, shards=4.5) as cache:
            for i in range(0, 10, 2):
                with cache.hold(order[i : i + 2]) as copies:
                    cache.prefetch(order[i + 2 : i + 4])
                    check_copies(copies, order[i : i + 2])

    watcher = threading.Thread(target=watch)
    watcher.start()
    readers = [threading.Thread(target=read, args=(offset,)) for offset in (0, 4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    done.set()
    watcher.join()
    assert 3 * SIZE < most <= 4.5 * SIZE + 2000  # leases take a few bytes
    assert not list(tmp_path.glob("*.lease"))


def test_shards_in_use_that_do_not_fit(tmp_path: Path, s3_bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    shards = upload(s3_bucket, "large", 4)
    with opened(tmp_path, shards=2.5) as cache:
        message = (
            rf"{tmp_path}: the shards that are read at once take 0.00135 GB and --data.cache-gigabytes .* allows 0.00112 GB"
        )
        with pytest.raises(ValueError, match=message):
            cache.hold(shards[:3]).__enter__()
        process = start(tmp_path, 10 * SIZE, [shards[0][0], shards[1][0]])
        assert process.stdout
        process.stdout.readline()
        with cache.hold(shards[:2]) as copies:  # the same ones
            check_copies(copies, shards[:2])
        ending = threading.Timer(1, end, [process])
        ending.start()
        with cache.hold(shards[2:]) as copies:  # after the other process has released its own
            check_copies(copies, shards[2:])
        ending.join()
    assert f"waiting for room, held by process {process.pid} on {socket.gethostname()}: {tmp_path}: the shards" in caplog.text
    assert "take 0.0018 GB, 0.0009 GB of them for other loaders, and" in caplog.text


def test_waiting_for_room_that_nobody_uses(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that holds copies shows life with each batch. Without it, the wait ends, and names the process."""
    monkeypatch.setattr("pipelines.remote.cache.FULL_SECONDS", 0.05)
    shards = upload(s3_bucket, "unused", 3)
    errors = []

    def wait() -> None:
        with opened(tmp_path, shards=2, timeout=0.6) as cache:
            try:
                cache.hold(shards[2:]).__enter__()
            except OSError as error:
                errors.append(str(error))

    with opened(tmp_path, shards=2) as other, other.hold(shards[:2]):
        waiting = threading.Thread(target=wait)
        waiting.start()
        for _ in range(10):
            time.sleep(0.1)
            assert not errors
            other.show_life()
        waiting.join(30)
    assert errors[0].startswith(
        f"waited 0.6 s (--data.timeout) for room that nobody uses, held by process {os.getpid()} on {socket.gethostname()}: "
    )


def test_waiting_for_a_process_that_has_stopped(
    tmp_path: Path, s3_bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for its copy lasts as long as the copy grows. Then it ends, and names the process and the file."""
    shards = upload(s3_bucket, "stopped", 1)
    monkeypatch.setattr("pipelines.remote.cache.BUSY_SECONDS", 0.05)
    faulty.fault = lambda method, path, start: "hang" if start == 3 * CHUNK and not faulty.released.is_set() else None
    process = start(tmp_path, 10 * SIZE, [shards[0][0]])
    wait_until(lambda: any(path.stat().st_size == 3 * CHUNK for path in tmp_path.glob("*.part")))
    process.send_signal(signal.SIGSTOP)
    faulty.fault = lambda method, path, start: None
    [part] = tmp_path.glob("*.part")
    with opened(tmp_path, timeout=0.6) as cache:
        grown = threading.Timer(0.4, os.truncate, [part, 2 * CHUNK])
        grown.start()
        began = time.monotonic()
        with pytest.raises(OSError, match="has stood still") as error:
            cache.hold(shards).__enter__()
        assert time.monotonic() - began > 0.9
        assert str(error.value) == (
            f"{part}: process {process.pid} is writing it, but it has stood still for 0.6 s (in training --data.timeout); "
            "end that process"
        )
        process.kill()
        process.communicate()
        with cache.hold(shards) as copies:  # a later attempt succeeds
            check_copies(copies, shards)


def test_waiting_for_the_room_of_a_copy_that_does_not_grow(tmp_path: Path, s3_bucket: str) -> None:
    """A process that copies ahead has no lease."""
    shards = upload(s3_bucket, "stuck", 1)
    path = tmp_path / f"other.{'0' * 16}-{'0' * 8}.{SIZE}.tar.part"
    part = open_locked(path)
    assert part
    with opened(tmp_path, shards=1.5, timeout=0.6) as cache:
        with pytest.raises(OSError, match=rf"^{path}: another loader of this process is writing it"):
            cache.hold(shards).__enter__()
        close_locked(part)
        with cache.hold(shards) as copies:
            check_copies(copies, shards)


def test_prefetching_stops_where_the_room_ends(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "ahead", 6)
    with opened(tmp_path, shards=3.5, threads=2) as cache:
        with cache.hold(shards[:1]):
            cache.prefetch(shards[1:5])
            wait_until(lambda: copied(tmp_path) == {"x-0", "x-1", "x-2"})
            faulty.released.wait(1)
            assert copied(tmp_path) | copied(tmp_path, "part") == {"x-0", "x-1", "x-2"}
        wait_until(lambda: copied(tmp_path) == {"x-1", "x-2", "x-3"})  # the first one is evicted
        with cache.hold(shards[3:6]) as copies:  # holding evicts prefetched copies
            check_copies(copies, shards[3:6])
            assert copied(tmp_path) == {"x-3", "x-4", "x-5"}


@pytest.mark.parametrize("damage", [b"", b"short", bytes(SIZE + 1)])
def test_a_copy_of_another_size_is_replaced(tmp_path: Path, s3_bucket: str, damage: bytes) -> None:
    shards = upload(s3_bucket, "damaged", 1)
    with opened(tmp_path) as cache:
        with cache.hold(shards) as copies:
            copies[0].write_bytes(damage)
        with cache.hold(shards) as copies:
            check_copies(copies, shards)


@pytest.mark.parametrize("store", ["s3_bucket", "gcs_bucket"])
def test_a_changed_object_is_copied_again(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    """Even if its size is the same, and there is room for one copy only."""
    shards = upload(request.getfixturevalue(store), "changed", 1)
    with opened(tmp_path, shards=1) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards)
    put(shards[0][0], 1)
    with opened(tmp_path, shards=1) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards, 1)


def test_an_object_that_changes_while_it_is_copied(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "changing", 1)

    def fault(method: str, path: str, start: int) -> Fault | None:
        if start == 2 * CHUNK:
            faulty.fault = lambda method, path, start: None
            put(shards[0][0], 1)
        return None

    faulty.fault = fault
    with opened(tmp_path, shards=1) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards, 1)
        assert len(list(tmp_path.glob("*tar*"))) == 1


def test_a_partial_copy_of_another_version_is_not_resumed(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "part", 1)
    faulty.fault = lambda method, path, start: "hang" if start == 3 * CHUNK and not faulty.released.is_set() else None
    with opened(tmp_path) as cache:
        cache.prefetch(shards)
        wait_until(lambda: any(path.stat().st_size == 3 * CHUNK for path in tmp_path.glob("*.part")))
    assert copied(tmp_path, "part") == {"x-0"}  # closing keeps it
    assert not faulty.released.is_set()  # and does not wait for the answer
    faulty.released.set()
    put(shards[0][0], 1)
    with opened(tmp_path) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards, 1)


def test_an_object_of_another_size_is_refused(tmp_path: Path, s3_bucket: str) -> None:
    [(url, _)] = upload(s3_bucket, "size", 1)
    with (
        opened(tmp_path) as cache,
        pytest.raises(ValueError, match=f"^{url}: had 7 bytes when .* has 450,000 now; start again"),
    ):
        cache.hold([(url, 7)]).__enter__()


def test_wrong_bytes_are_found(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    shards = upload(s3_bucket, "flipped", 1)
    flips: list[Fault] = ["flip"]
    faulty.fault = lambda method, path, start: flips.pop() if start == CHUNK and flips else None
    with opened(tmp_path) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards)
    assert not flips


def test_an_etag_that_is_no_checksum(
    tmp_path: Path, s3_bucket: str, faulty: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The ETag of an object that is encrypted with a customer's key is not an MD5. A second, equal copy settles it."""
    shards = upload(s3_bucket, "etag", 1)
    faulty.fault = lambda method, path, start: "etag"
    with opened(tmp_path) as cache, cache.hold(shards) as copies:
        check_copies(copies, shards)
    assert faulty.bytes_of("x-0.tar") == []
    assert sum(request.start == 0 for request in faulty.requests) == 2
    assert "two copies agree but do not match the ETag" in caplog.text


def test_an_interrupted_process_leaves_nothing_locked(tmp_path: Path, s3_bucket: str) -> None:
    shards = upload(s3_bucket, "locks", 1)
    process = start(tmp_path, SIZE, [shards[0][0]])
    assert process.stdout
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    put(shards[0][0].replace("x-0", "y"))
    other = [(shards[0][0].replace("x-0", "y"), SIZE)]
    with opened(tmp_path, shards=1) as cache, cache.hold(other) as copies:
        check_copies(copies, other)
    assert copied(tmp_path) == {"y"}


def test_wrong_bytes_each_time(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    """Each copy has another wrong byte."""
    [(url, _)] = upload(s3_bucket, "corrupt", 1)
    copies = 0

    def fault(method: str, path: str, start: int) -> Fault | None:
        nonlocal copies
        copies += start == 0
        return "flip" if start == (copies - 1) * CHUNK else None

    faulty.fault = fault
    message = f"^{url}: the checksums of 3 copies, .*, differ from [0-9a-f]{{32}}, which the store states; the network may"
    with opened(tmp_path) as cache, pytest.raises(OSError, match=message):
        cache.hold([(url, SIZE)]).__enter__()


def test_a_full_disk(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.Transfer, "run", run)
    shards = upload(s3_bucket, "full", 1)
    message = (
        r"^.*/x-0\.\S+\.tar\.part: No space left on device; lower --data\.cache-gigabytes, or name another --data\.cache-dir"
    )
    with opened(tmp_path) as cache, pytest.raises(ValueError, match=message):
        cache.hold(shards).__enter__()


def test_a_temporary_cache_is_deleted(s3_bucket: str) -> None:
    shards = upload(s3_bucket, "temporary", 1)
    with open_cache("", 1) as cache, cache.hold(shards) as copies:
        assert hashlib.md5(copies[0].read_bytes()).digest() == hashlib.md5(content(shards[0][0])).digest()
    assert not copies[0].parent.exists()


def test_a_missing_temporary_folder_is_named_with_what_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(ValueError, match=r"no temporary folder .* \(No such file or directory\); .*--data\.cache-dir .*TMPDIR"),
        open_cache("", 1),
    ):
        pass
