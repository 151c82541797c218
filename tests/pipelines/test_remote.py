"""Training from an object store: URLs, index files, and the same batches as from a folder."""

import concurrent.futures
import gzip
import http.server
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Batch, Loader
from pipelines.remote import object_store as remote
from pipelines.shards.index import read_index, scan_tar
from pipelines.shards.shard_set import open_shards
from tests.helpers.faults import Fault, FaultyProxy
from tests.helpers.loader_contract import same, saved, take
from tests.tools.test_verify import write_tar
from tools.shards.convert import convert
from tools.shards.plan import Options

CPU = torch.device("cpu")
BLOCKS: dict[str, Any] = {"order": "blocks", "block_shards": 2}
STORES = ["s3_bucket", "gcs_bucket"]


@pytest.fixture(autouse=True)
def index_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "googlenet-dali" / "index"


def put(url: str, data: bytes) -> None:
    files = remote.filesystem(url)
    files.pipe_file(files._strip_protocol(url), data)


def upload(folder: Path, url: str, pattern: str = "*") -> str:
    for path in folder.glob(pattern):
        put(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.fixture(params=STORES)
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def uploaded(bucket: str, shards: Path) -> str:
    return upload(shards, f"{bucket}/whole")


def make_tar(names: list[str], size: int = 1) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = size + i
            tar.addfile(member, io.BytesIO(b"0" * member.size))
    return data.getvalue()


@pytest.mark.parametrize(
    "pattern",
    ["", "/", "/train-*.tar", "/train-{000000..000003}.tar", "/train-00000[0-3].tar", "/{train-000000,train-00000[1-3]}.tar"],
)
def test_notations(shards: Path, uploaded: str, pattern: str) -> None:
    found, local = open_shards(uploaded + pattern, "train"), open_shards(str(shards), "train")
    assert found.tars == tuple(f"{uploaded}/{Path(tar).name}" for tar in local.tars)
    assert [read_index(index) for index in found.indices] == [read_index(index) for index in local.indices]
    assert (found.lengths, found.sizes, found.classes) == (local.lengths, local.sizes, local.classes)
    assert (found.num_samples, found.num_classes()) == (61, 3)


def test_one_tar_and_a_folder_without_info(bucket: str, shards: Path) -> None:
    url = upload(shards, f"{bucket}/bare", "valid-*.tar")
    assert open_shards(f"{url}/valid-000001.tar", "train").lengths == (10,)
    assert open_shards(url, "valid").lengths == (10, 10, 5)
    put(f"{url}/train-000000.tar", b"")
    with pytest.raises(
        ValueError, match=rf"{url} has shards of several naming schemes: train-######\.tar \(1\), .*; name one"
    ) as error:
        open_shards(url, "valid")
    assert str(error.value).endswith(f"for example '{url}/train-*.tar'")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0}/none", "no .tar files in folder {0}/none"),
        ("{0}/none/x.tar", "no such shard: '{0}/none/x.tar'"),
        ("{0}/none/x-*.tar", "no such shard: '{0}/none/x-*.tar'"),
        ("{0}/whole/train-{{000003..000004}}.tar", "no such shard: '{0}/whole/train-000004.tar' (part of "),
        ("{0}x/x.tar", "no such shard: '{0}x/x.tar'"),
        ("{0}x", "no .tar files in folder {0}x"),
        ("{0}/whole/train-{{0.tar", "the braces do not match"),
        ("{0}/whole", "folder {0}/whole has the splits train, valid, but none called 'test'; name the shards themselves"),
    ],
)
def test_missing_shards_are_named(bucket: str, uploaded: str, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message.format(bucket))):
        open_shards(pattern.format(bucket), "test")


@pytest.mark.parametrize("denied", [False, True])
def test_many_shards_take_a_few_requests(s3_bucket: str, faulty: FaultyProxy, denied: bool) -> None:
    """A listing, if allowed, replaces a request per object."""

    def deny_lists(method: str, path: str, start: int) -> Fault | None:
        return "403" if denied and "list-type" in path else None

    url = f"{s3_bucket}/many-{denied}"
    for number in range(40):
        put(f"{url}/x-{number:02d}.tar", make_tar(["1.jpg", "1.cls"], size=number))
    faulty.reset(latency=0)
    faulty.fault = deny_lists
    pattern = f"{url}/x-{{00..39}}.tar"
    found = open_shards(pattern, "train")
    assert found.tars == tuple(f"{url}/x-{number:02d}.tar" for number in range(40))
    assert [request.method for request in faulty.requests if request.path.endswith(".tar")].count("HEAD") == (denied and 40)
    faulty.reset(latency=0)
    faulty.fault = deny_lists
    assert open_shards(pattern, "train") == found  # now the indices are in the cache
    if denied:
        return
    assert len(faulty.requests) == 3  # the listing, and two for the missing `_info.json`
    with pytest.raises(ValueError, match=r"no such shard: '.*/x-40\.tar' \(part of "):
        open_shards(f"{url}/x-{{00..40}}.tar", "train")


def test_missing_shards_of_the_info_are_named(bucket: str, shards: Path) -> None:
    url = upload(shards, f"{bucket}/part", "_info.json")
    with pytest.raises(ValueError, match=rf"{url}/_info\.json lists shards that are not there: train-000000\.tar"):
        open_shards(url, "train")


def test_labels_are_not_read_over_the_network(bucket: str, shards: Path) -> None:
    url = upload(shards, f"{bucket}/unlabelled", "valid-*.tar")
    found = open_shards(f"{url}/valid-*.tar", "valid")
    assert found.classes is None
    with pytest.raises(ValueError, match=r"unlabelled/valid-000000\.tar: .*_info\.json .*--data\.class-file"):
        found.num_classes()


def test_an_index_beside_the_tar_is_fetched_once(s3_bucket: str, faulty: FaultyProxy, index_cache: Path) -> None:
    tar = make_tar(["1.jpg", "1.cls", "2.jpg", "2.cls"])
    put(f"{s3_bucket}/beside/x.tar", tar)
    put(f"{s3_bucket}/beside/x.idx", b"v1.2 1\njpg 512 1 1.jpg cls 1536 2 1.cls\n")
    for _ in range(2):
        found = open_shards(f"{s3_bucket}/beside/x.tar", "train")
        assert found.lengths == (1,)  # the tar has two, but the index decides
        assert found.indices[0].is_relative_to(index_cache)
    assert len(faulty.bytes_of("x.idx")) == 1
    put(f"{s3_bucket}/beside/x.tar", make_tar(["1.jpg", "1.cls"], size=7))
    with pytest.raises(ValueError, match=rf"^{s3_bucket}/beside/x\.idx: not an index of {s3_bucket}/beside/x\.tar; remove it"):
        open_shards(f"{s3_bucket}/beside/x.tar", "train")


def test_an_index_is_built_from_headers(tmp_path: Path, s3_bucket: str, faulty: FaultyProxy) -> None:
    """It is built once, despite faults, and without reading the images."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(4):
            for extension, size in (("jpg", 400_000), ("cls", 1)):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    put(f"{s3_bucket}/headers/x.tar", (tmp_path / "x.tar").read_bytes())
    met: set[tuple[str, str, int]] = set()

    def fault(*request: object) -> Fault | None:
        return None if request in met else met.add(request) or "503"  # type: ignore[arg-type,func-returns-value,return-value]

    faulty.fault = fault
    found = open_shards(f"{s3_bucket}/headers/*.tar", "train")
    assert read_index(found.indices[0]) == scan_tar(tmp_path / "x.tar")
    read = sum(size for _, size in faulty.bytes_of("x.tar"))
    assert 0 < read < found.sizes[0] / 10
    assert open_shards(f"{s3_bucket}/headers/*.tar", "train").indices == found.indices
    assert sum(size for _, size in faulty.bytes_of("x.tar")) == read
    faulty.fault = lambda method, path, start: None
    # Another tar at the same URL gets a new index.
    put(f"{s3_bucket}/headers/x.tar", make_tar(["1.jpg", "1.cls"]))
    assert open_shards(f"{s3_bucket}/headers/*.tar", "train").lengths == (1,)


def test_a_folder_of_indices_comes_first(tmp_path: Path, bucket: str) -> None:
    put(f"{bucket}/dir/x.tar", make_tar(["1.jpg", "1.cls", "2.jpg", "2.cls"]))
    (tmp_path / "x.idx").write_text("v1.2 1\njpg 512 1 1.jpg cls 1536 2 1.cls\n")
    found = open_shards(f"{bucket}/dir/x.tar", "train", str(tmp_path))
    assert (found.indices, found.lengths) == ((tmp_path / "x.idx",), (1,))
    (tmp_path / "x.idx").write_text("v1.2 1\njpg 512 7 1.jpg cls 1536 2 1.cls\n")
    with pytest.raises(ValueError, match=rf"x\.idx: not an index of {bucket}/dir/x\.tar"):
        open_shards(f"{bucket}/dir/x.tar", "train", str(tmp_path))


def test_a_damaged_tar_is_named(bucket: str) -> None:
    put(f"{bucket}/bad/x.tar", make_tar(["1.jpg", "1.cls"])[:1200])
    with pytest.raises(ValueError, match=rf"^{bucket}/bad/x\.tar: "):
        open_shards(f"{bucket}/bad/x.tar", "train")
    put(f"{bucket}/bad/packed.tar", gzip.compress(make_tar(["1.jpg", "1.cls"])))
    with pytest.raises(ValueError, match=r"packed\.tar: compressed \(gzip\); copy it, unpack the copy with `gunzip`, and"):
        open_shards(f"{bucket}/bad/packed.tar", "train")


def batches(place: str, split: str, cache_dir: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    config = DataConfig(train=place, valid=place, cache_dir=cache_dir, **BLOCKS)
    with build_loader(config, LoaderSpec(split=split, batch_size=8, image_size=48, device=CPU, num_threads=2)) as loader:  # type: ignore[arg-type]
        for _ in range(2):
            yield from ((batch["image"], batch["target"]) for batch in loader)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("kept", [False, True])
def test_the_same_batches_as_from_a_folder(tmp_path: Path, shards: Path, uploaded: str, split: str, kept: bool) -> None:
    expected = list(batches(str(shards), split, ""))
    ours = list(batches(uploaded, split, str(tmp_path / "cache") if kept else ""))
    assert len(expected) == len(ours) == (14 if split == "train" else 8)
    for (image, target), (other_image, other_target) in zip(expected, ours, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target, other_target)
    if kept:
        names = sorted(path.name.split(".")[0] for path in (tmp_path / "cache").glob("*.tar"))
        assert names == [Path(tar).stem for tar in open_shards(str(shards), split).tars]


def test_training_continues_through_faults(
    tmp_path: Path, shards: Path, s3_bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches stay the same despite faults, an absent server, little room, and resuming with an empty cache."""
    url = upload(shards, f"{s3_bucket}/faults")
    kinds: list[Fault] = ["reset", "503", "cut", "short"]
    faulty.fault = lambda method, path, start: kinds.pop() if kinds and start >= 0 else None

    def make(location: str, cache: str) -> Loader:
        room = 2.5 * max(path.stat().st_size for path in shards.glob("train-*.tar")) / 1e9
        config = DataConfig(train=location, cache_dir=str(tmp_path / cache), cache_gigabytes=room, **BLOCKS)
        return build_loader(config, LoaderSpec(split="train", batch_size=4, image_size=32, device=CPU, num_threads=1))

    with make(str(shards), "none") as loader:
        expected = take(loader, 32)
    with make(url, "one") as loader:
        batches = take(loader, 10)
        faulty.go_away()
        back = threading.Timer(2, faulty.come_back)
        back.start()
        batches += take(loader, 10)
        back.join()
        state = saved(loader.state_dict())
        assert len(list((tmp_path / "one").glob("*.tar"))) <= 2
    with make(url, "other") as loader:
        loader.load_state_dict(state)
        assert same([*batches, *take(loader, 12)], expected)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_back_and_forth_within_a_block(shards: Path, tmp_path: Path, s3_bucket: str, split: str) -> None:
    """Each of two ranks holds only the shards that it needs from its position in the block on."""
    url = upload(shards, f"{s3_bucket}/back-{split}")

    def make(location: str) -> Loader:
        config = DataConfig(train=location, valid=location, cache_dir=str(tmp_path / "cache"), order="blocks", block_shards=4)
        options = {"batch_size": 3, "image_size": 32, "num_threads": 1, "rank": 1, "world_size": 2}
        return build_loader(config, LoaderSpec(split=split, device=CPU, **options))  # type: ignore[arg-type]

    with make(str(shards)) as local, make(url) as remote:
        states, batches = [], []
        for _ in range(len(local)):
            states.append(saved(local.state_dict()))
            batches += take(local, 1)
        for position in (3, 0, 2, 1, 3):
            remote.load_state_dict(states[position])
            assert same(take(remote, 1), batches[position : position + 1]), position


def test_stand_ins_from_a_bucket(tmp_path: Path, s3_bucket: str) -> None:
    """Stand-ins for a training batch without good samples come from shards that only the other rank would have read."""
    folder = tmp_path / "bad"
    image = io.BytesIO()
    Image.new("RGB", (40, 40)).save(image, "PNG")
    for number in range(4):
        members = [(f"{number}{i}.{end}", data) for i in range(8) for end, data in (("png", image.getvalue()), ("cls", b"?"))]
        members += [(f"{number}9.{end}", data) for end, data in (("png", image.getvalue()), ("cls", b"1"))]
        write_tar(folder / f"train-{number}.tar", members)
    url = f"{upload(folder, f'{s3_bucket}/bad')}/train-{{0..3}}.tar"
    for rank in range(2):
        config = DataConfig(train=url, cache_dir=str(tmp_path / "cache"), max_bad_fraction=1, block_shards=2)
        options = {"batch_size": 3, "image_size": 32, "num_threads": 1, "num_classes": 2, "rank": rank, "world_size": 2}
        with build_loader(config, LoaderSpec(split="train", device=CPU, **options)) as loader:  # type: ignore[arg-type]
            targets = [batch["target"].tolist() for _ in range(2) for batch in loader]
        assert [len(of_batch) for of_batch in targets] == [2] * 12
        assert {target for of_batch in targets for target in of_batch} == {1}


def test_loaders_that_share_little_room_take_turns(tmp_path: Path, shards: Path, s3_bucket: str) -> None:
    """Two ranks share room for one of them: one waits for the other, and both finish."""
    url = upload(shards, f"{s3_bucket}/room")
    room = 2.2 * max(path.stat().st_size for path in shards.glob("train-*.tar")) / 1e9

    def epoch(rank: int, location: str) -> list[Batch]:
        config = DataConfig(train=location, cache_dir=str(tmp_path / "cache"), cache_gigabytes=room, **BLOCKS)
        options = {"batch_size": 4, "image_size": 32, "num_threads": 1, "rank": rank, "world_size": 2}
        with build_loader(config, LoaderSpec(split="train", device=CPU, **options)) as loader:  # type: ignore[arg-type]
            return take(loader, 14)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        remote_ones = list(threads.map(lambda rank: epoch(rank, url), range(2)))
    assert all(same(ours, epoch(rank, str(shards))) for rank, ours in enumerate(remote_ones))


@pytest.mark.parametrize(
    ("fault", "pattern", "message"),
    [
        ("expired", "/x.tar", r"/x\.tar: The provided token has expired\.$"),
        ("expired", "", r"/why: The provided token has expired\.$"),
        ("403", "/x.tar", r"/x\.tar: Access Denied$"),
        ("403", "/*.tar", r"/\*\.tar: Access Denied$"),
    ],
)
def test_the_reason_of_a_refusal_is_said_at_once(
    s3_bucket: str, faulty: FaultyProxy, fault: Fault, pattern: str, message: str
) -> None:
    put(f"{s3_bucket}/why/x.tar", make_tar(["1.jpg", "1.cls"]))
    faulty.reset(latency=0)
    faulty.fault = lambda method, path, start: fault
    with pytest.raises(PermissionError, match=message):
        open_shards(f"{s3_bucket}/why{pattern}", "train")
    assert len(faulty.requests) <= 3


def test_a_store_that_gives_no_answer_is_given_up(s3_bucket: str, faulty: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that hang end after a time, and so do the attempts."""
    put(f"{s3_bucket}/hang/x.tar", make_tar(["1.jpg", "1.cls"]))
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    monkeypatch.setattr("pipelines.remote.retrying.PATIENCE_SECONDS", 0.5)
    remote._filesystem.cache_clear()
    faulty.fault = lambda method, path, start: "hang"
    with pytest.raises(OSError, match=r"/x\.tar: only errors for 0 s; the last one: Read timeout on endpoint URL"):
        open_shards(f"{s3_bucket}/hang/x.tar", "train")
    remote._filesystem.cache_clear()


def test_wrong_settings_are_not_tried_again(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Botocore has errors of its own for them."""
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    for url, message in (
        ("s3://without-profile/x.tar", r"The config profile \(nosuch\) could not be found"),
        (f"{s3_bucket} 2/x.tar", "Parameter validation failed"),
    ):
        with pytest.raises(OSError, match=f"^{url}: {message}"):
            open_shards(url, "train")
        monkeypatch.delenv("AWS_PROFILE", raising=False)


def test_a_web_server_that_does_not_state_sizes() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.tar"
        with pytest.raises(ValueError, match=f"^{url}: the server does not state its size; copy the shards to a local folder"):
            open_shards(url, "train")
        server.shutdown()


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_conversion_goes_on_after_faults(s3_bucket: str, faulty: FaultyProxy, image_folder: Path, fault: Fault) -> None:
    """Each kind of request fails once, and none of the shards is built again or lost."""
    met: set[tuple[str, bool]] = set()
    faulty.reset(latency=0)

    def once(method: str, path: str, start: int) -> Fault | None:
        kind = (method, "list-type" in path)
        return None if kind in met else met.add(kind) or fault  # type: ignore[func-returns-value]

    faulty.fault = once
    summary = convert(image_folder, f"{s3_bucket}/out-{fault}", Options(name="valid", shard_samples=10), num_workers=1)
    assert summary.shard_lengths == (10, 10, 5)
    assert len(met) >= 3
    faulty.reset(latency=0)
    assert open_shards(f"{s3_bucket}/out-{fault}", "valid").num_samples == 25
