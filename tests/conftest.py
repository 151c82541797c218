"""Small data sets that the tests share. They are made as a user makes them: class folders, converted with the real command."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.faults import FaultyProxy
from tests.helpers.runs import train_command
from tools.shards.convert import convert
from tools.shards.plan import Options

CLASSES = ("ant", "bee", "cat")
# Files that take long, the longest first. They start first, so that the processes of pytest-xdist end at about the same time.
LONG = (
    *("test_kill", "test_long", "test_disk", "test_input", "test_store", "test_messages"),
    *("test_demo", "test_distributed", "test_preemption", "test_throughput_train", "test_throughput_loader", "test_train"),
    "test_trackers",
    *("test_dali", "test_gpu_proof", "test_checkpoints", "test_step", "test_step_without_gpu", "test_bench_scale"),
    *("test_throughput_compare", "test_other_settings", "test_small_sets", "test_export", "test_googlenet", "test_init_from"),
    *("test_evaluation", "test_shape"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files by how long they take."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def write_image(path: Path, seed: int, size: tuple[int, int] = (90, 70), **options: object) -> None:
    """Writes an image with structure at every scale. `size` is (width, height), and the name decides the format."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3), np.float32)
    for cells in (2, 5, 13, 40):
        grid = Image.fromarray(rng.uniform(0, 255 / 4, (cells, cells, 3)).astype(np.uint8))
        pixels += np.asarray(grid.resize(size, Image.Resampling.BICUBIC))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, **options)


def write_tree(folder: Path, num_images: int, seed: int = 0) -> Path:
    """Writes class folders with `num_images` JPEGs of many sizes, and returns their folder."""
    for i in range(num_images):
        size = (64 + 7 * i % 90, 64 + 11 * i % 70)
        write_image(folder / CLASSES[i % 3] / f"{i:03d}.jpg", seed * 1000 + i, size, quality=90)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images") / "valid", 25)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A data set of 61 training samples in 4 shards and 25 validation samples in 3."""
    destination = tmp_path_factory.mktemp("shards")
    train = write_tree(image_folder.parent / "train", 61, seed=1)
    convert(train, destination, Options(name="train", shard_samples=16), num_workers=1)
    convert(image_folder, destination, Options(name="valid", shard_samples=10), num_workers=1)
    return destination


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 2 epochs of 7 steps on these shards: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    done = train_command(
        *("--data.train", f"{shards}/train-{{000000..000003}}.tar", "--data.valid", f"{shards}/valid-*.tar"),
        *("--epochs", 2, "--batch-size", 8, "--image-size", 32, "--log-every", 3, "--device", "cpu", "--seed", 3),
        *("--run-dir", folder / "run"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, and no progress bar where there is no terminal
    return folder / "run", done.stdout


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[FaultyProxy]:
    """An S3 server in this process, behind a proxy. The environment leads to it, also in processes that a test starts."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with FaultyProxy(f"http://{host}:{port}") as proxy, pytest.MonkeyPatch.context() as monkeypatch:
        environment = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
        import s3fs

        s3fs.S3FileSystem().mkdir("shards")
        yield proxy
    server.stop()


@pytest.fixture(scope="session")
def s3_bucket(_s3_server: FaultyProxy) -> str:
    """The URL of a bucket, which is empty at first."""
    return "s3://shards"


@pytest.fixture
def faulty(_s3_server: FaultyProxy) -> Iterator[FaultyProxy]:
    """The proxy of the S3 server, with an empty log. Each answer takes 30 ms."""
    _s3_server.reset(latency=0.03)
    yield _s3_server
    _s3_server.reset(latency=0)


@pytest.fixture(scope="session")
def gcs_bucket() -> Iterator[str]:
    """The URL of a bucket on a server with Google's interface, otherwise as `s3_bucket`."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="shards")
    with server, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://shards"


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    # The tensors of the tests are small. More threads would only wait for each other and for DALI's.
    torch.set_num_threads(1)
