"""Conversions that are killed, repeated, changed, distributed or out of space end with the same bytes or a one-line error."""

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_image, write_tree
from tests.helpers.runs import environment
from tests.tools.test_shards_command import call_shards, digests, shards_command
from tools.shards.storage import open_storage


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images, one of them damaged, and a GIF. They are enough for stopping a conversion in the middle."""
    folder = write_tree(tmp_path_factory.mktemp("many") / "images", 240)
    damaged = folder / "ant" / "000.jpg"
    damaged.write_bytes(damaged.read_bytes()[:900])
    write_image(folder / "cat" / "moving.gif", 3)
    return folder


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    done = shards_command("convert", images, folder, "--shard-samples", 4, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "train: 240 images of 3 classes in 61 shards" in done.stdout
    return digests(folder)


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tools.shards", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(folder: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {count} {pattern} in {sorted(folder.glob('*'))}"
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("pattern", "count"), [(".train.convert/plan.json", 1), ("train-*.tar", 1), (".train.convert/0*.json", 9)]
)
def test_killed_and_run_again(
    images: Path, undisturbed: dict[str, str], tmp_path: Path, pattern: str, count: int, workers: int
) -> None:
    arguments = ("convert", images, tmp_path / "out", "--shard-samples", 4, "--workers", workers)
    process = start(*arguments)
    wait_for(tmp_path / "out", pattern, count)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "_info.json").exists()
    for tar in (tmp_path / "out").glob("train-*.tar"):  # complete, or missing
        assert digests(tmp_path / "out")[tar.name] == undisturbed[tar.name]
    kept = {tar: tar.stat().st_mtime_ns for tar in (tmp_path / "out").glob("train-*.tar")}
    done = shards_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == undisturbed
    if count == 9:
        assert sum(tar.stat().st_mtime_ns == modified for tar, modified in kept.items()) >= 9  # these were not rebuilt
    done = shards_command(*arguments)
    assert "already complete, nothing to do" in done.stdout
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("busy", [True, False])
def test_workers_end_with_the_command(images: Path, tmp_path: Path, busy: bool) -> None:
    """Busy workers and starting workers both end."""
    process = start("convert", images, tmp_path / "out", "--shard-samples", 1, "--workers", 2)
    wait_for(tmp_path / "out", "train-*.tar" if busy else ".train.convert/plan.json", 1)
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children := [int(child) for child in task.read_text().split()]) < 3:  # one is the resource tracker
        time.sleep(0.001)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker goes on without the command"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_interruption_says_how_to_continue(images: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.shards", "convert", images, tmp_path / "out", "--shard-samples", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "out", "train-*.tar", 1)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, also to the workers
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted; to continue an interrupted `convert`, run the same command again\n"
    assert shards_command(*command[3:]).returncode == 0
    assert digests(tmp_path / "out") == undisturbed


def test_a_killed_worker_is_reported(images: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.shards", "convert", images, tmp_path / "out", "--shard-samples", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out", "train-*.tar", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == "error: a worker process was killed, perhaps for lack of memory; run the same command again to continue\n"
    assert shards_command(*command[3:]).returncode == 0
    assert digests(tmp_path / "out") == undisturbed


@pytest.fixture
def half_done(images: Path, tmp_path: Path) -> Path:
    """A conversion that was killed in the middle."""
    process = start("convert", images, tmp_path / "out", "--shard-samples", 4, "--workers", 1)
    wait_for(tmp_path / "out", "train-*.tar", 2)
    process.kill()
    process.wait()
    return tmp_path / "out"


def test_other_options_are_refused_and_named(
    images: Path, half_done: Path, undisturbed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests_of_files(half_done)
    done = call_shards(capsys, "convert", images, half_done, "--shard-samples", 5, "--seed", 1, "--resize", 32)
    assert done.returncode == 2
    assert "the conversion of split 'train' was started differently: " in done.stderr
    assert "--resize was not given and is 32" in done.stderr
    assert (
        "--seed was 0 and is 1; --shard-samples was 4 and is 5; restore what changed, or start over with --overwrite"
        in done.stderr
    )
    assert digests_of_files(half_done) == before
    done = shards_command("convert", images, half_done, "--shard-samples", 4, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert digests(half_done) == undisturbed


def test_a_complete_split_that_lost_a_shard_is_noticed(images: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    arguments = ("convert", images, tmp_path / "out", "--shard-samples", 4)
    assert shards_command(*arguments).returncode == 0
    (tmp_path / "out" / "train-000003.tar").write_bytes(b"")
    done = shards_command(*arguments)
    assert done.returncode == 2
    assert "1 shard is missing or cut short, for example train-000003.tar; --overwrite writes all of them again" in done.stderr
    assert shards_command(*arguments, "--overwrite").returncode == 0
    assert digests(tmp_path / "out") == undisturbed


def digests_of_files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_changed_source_is_refused_and_named(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", 30)
    arguments = ("convert", images, tmp_path / "out", "--shard-samples", 2, "--workers", 1)
    process = start(*arguments)
    wait_for(tmp_path / "out", "train-*.tar", 2)
    process.kill()
    process.wait()
    (images / "ant" / "000.jpg").unlink()
    os.utime(images / "ant" / "003.jpg", ns=(1, 1))
    write_image(images / "bee" / "new.jpg", 1)
    done = shards_command(*arguments)
    assert done.returncode == 2
    found = "the images of the source have changed: 1 missing (ant/000.jpg), 1 new (bee/new.jpg), 1 changed (ant/003.jpg)"
    assert found in done.stderr
    assert done.stderr.count("\n") == 1


def test_two_at_once_do_not_mix(images: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    process = start("convert", images, tmp_path / "out", "--shard-samples", 4, "--workers", 1)
    wait_for(tmp_path / "out", "train-*.tar", 1)
    done = shards_command("convert", images, tmp_path / "out", "--shard-samples", 4)
    assert process.wait() == 0
    if done.returncode:  # otherwise the first had finished before the second started
        assert "another process is at work there" in done.stderr
    assert digests(tmp_path / "out") == undisturbed


def test_a_refused_run_leaves_the_lock_alone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(str(tmp_path / "out"))
    with storage.lock(".train.convert"):
        for _ in range(2):
            done = call_shards(capsys, "convert", images, tmp_path / "out")
            assert done.returncode == 2
            assert "another process is at work there" in done.stderr


def test_overwrite_keeps_the_old_split_where_there_is_no_space_for_a_new_one(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", 3)
    assert shards_command("convert", images, tmp_path / "out").returncode == 0
    before = digests(tmp_path / "out")
    with open(images / "ant" / "huge.jpg", "wb") as file:
        file.truncate(1 << 42)
    done = shards_command("convert", images, tmp_path / "out", "--overwrite")
    assert done.returncode == 2
    assert "are needed and" in done.stderr
    assert digests(tmp_path / "out") == before


def test_odd_names_in_lists_do_not_stop_later_splits(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", 3)
    for name in ("line\u2028separator.jpg", "new\nline.jpg", "re\rturn\t.jpg", "latin\udce9.jpg"):
        (images / "ant" / name).write_text("no image")
    for split in ("train", "valid", "train"):
        done = shards_command("convert", images, tmp_path / "out", "--name", split)
        assert done.returncode == 0, done.stderr
    assert "already complete" in done.stdout
    assert len((tmp_path / "out" / "rejected.jsonl").read_bytes().split(b"\n")) == 9


def test_strict_stops_at_the_first(images: Path, tmp_path: Path) -> None:
    done = shards_command("convert", images, tmp_path / "out", "--strict")
    assert done.returncode == 3
    assert done.stderr == f"error: ant/000.jpg in {images}/ant/000.jpg: jpeg image cut short\n"
    assert not (tmp_path / "out" / "_info.json").exists()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    images: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: writes fail in the middle."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "tools.shards", "convert", images, tmp_path / "out", "--shard-samples", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {tmp_path}/out/train-\d+\.tar: File too large\n", done.stderr)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert shards_command(*command[3:]).returncode == 0
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("disturb", "status", "message"),
    [
        (
            lambda out: (out / "train-000001.tar").unlink(),
            1,
            "1 finished shard disappeared, for example train-000001.tar; all workers must have access to this folder\n",
        ),
        (
            lambda out: (out / "_info.json").write_text('{"splits": {"valid": {"filenames": ["x.tar"]}}, "classes": ["x"]}'),
            2,
            "another process added a split with other classes; --overwrite converts this split again\n",
        ),
    ],
)
def test_another_process_changes_the_destination(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    disturb: Callable[[Path], None],
    status: int,
    message: str,
) -> None:
    out = tmp_path / "out"

    def run(function: Callable[[Any], Any], tasks: Iterable[Any], _: int) -> Iterator[Any]:
        yield from map(function, tasks)
        disturb(out)

    monkeypatch.setattr("tools.shards.convert.run", run)
    done = call_shards(capsys, "convert", images, out, "--shard-samples", 200)
    assert (done.returncode, done.stderr) == (status, f"error: {out}: {message}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """A Dask scheduler and two workers, each a process."""
    from distributed import Client

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dask = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--port",
        str(port),
        "--no-dashboard",
        "--host",
        "127.0.0.1",
    ]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    elsewhere = tmp_path / "workers"
    elsewhere.mkdir()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": elsewhere, "env": environment()}
    processes = [subprocess.Popen(dask, **quiet)]
    processes += [subprocess.Popen(worker, **quiet) for _ in range(2)]
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:  # keeps asyncio's loop out of this thread
            thread.submit(_wait_for_workers, Client, address).result()
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_for_workers(client: type, address: str) -> None:
    with client(address, timeout=60) as connected:
        connected.wait_for_workers(2, timeout=60)


def test_a_dask_cluster_that_loses_a_worker(
    images: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    cluster: tuple[str, list["subprocess.Popen[bytes]"]],
) -> None:
    address, workers = cluster
    relative = Path(os.path.relpath(tmp_path / "out"))  # the workers have another current folder
    command = [sys.executable, "-m", "tools.shards", "convert", images, relative, "--shard-samples", "4"]
    process = subprocess.Popen([*command, "--executor", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out", ".train.convert/0*.json", 3)
    workers[0].kill()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "train: 240 images" in output
    assert digests(tmp_path / "out") == undisturbed
    workers[1].terminate()
    workers[1].wait()
    done = shards_command("convert", images, tmp_path / "out", "--name", "valid", "--executor", address)
    message = f"error: --executor {address}: the scheduler has no workers; start some with `dask worker {address}`\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_no_dask_scheduler_there(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call_shards(capsys, "convert", images, tmp_path / "out", "--executor", "tcp://127.0.0.1:9")
    assert done.returncode == 2
    assert "--executor tcp://127.0.0.1:9: no Dask scheduler answers there" in done.stderr
    assert done.stderr.count("\n") == 1


def test_shards_in_an_object_store(images: Path, undisturbed: dict[str, str], tmp_path: Path, s3_bucket: str) -> None:
    import fsspec

    arguments = ("convert", images, f"{s3_bucket}/sets/mine", "--shard-samples", 4, "--workers", 2)
    process = start(*arguments)
    files = fsspec.filesystem("s3", use_listings_cache=False)
    deadline = time.monotonic() + 60
    while len(files.glob(f"{s3_bucket}/sets/mine/train-*.tar")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = shards_command(*arguments)
    assert done.returncode == 0, done.stderr
    files.get(f"{s3_bucket}/sets/mine/", f"{tmp_path}/copy/", recursive=True)
    assert digests(tmp_path / "copy") == undisturbed
    assert json.loads((tmp_path / "copy" / "_info.json").read_text())["splits"]["train"]["num_samples"] == 240
    assert "already complete, nothing to do" in shards_command(*arguments).stdout
    done = shards_command("convert", images, "s3://no-such-bucket/x")
    assert done.returncode == 2
    assert "s3://no-such-bucket/x: cannot be written to" in done.stderr
