"""An object store that fails, is slow, goes away, refuses, cuts bodies short and changes objects."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Batch
from pipelines.remote import transfer
from tests.faults.campaign import LONG, Outcomes, seeds, size
from tests.helpers.faults import Fault, FaultyProxy
from tests.helpers.loader_contract import same
from tests.pipelines.test_remote import put, upload

NUM_EPOCHS = 2
KINDS: list[Fault] = ["reset", "cut", "short", "503", "500"]
Faults = Callable[[str, str, int], Fault | None]


@pytest.fixture(autouse=True)
def _many_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 5_000)


@pytest.fixture(scope="module")
def url(s3_bucket: str, shards: Path) -> str:
    return upload(shards, f"{s3_bucket}/night", "train-*")


def batches(location: str, cache: Path) -> Iterator[Batch]:
    config = DataConfig(train=location, cache_dir=str(cache), order="blocks", block_shards=2)
    spec = LoaderSpec(split="train", batch_size=4, image_size=32, device=torch.device("cpu"), num_threads=1, num_classes=3)
    with build_loader(config, spec) as loader:
        for _ in range(NUM_EPOCHS):
            yield from loader


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    return list(batches(f"{shards}/train-*.tar", tmp_path_factory.mktemp("none")))


def check(found: list[Batch], expected: list[Batch], cache: Path, outcomes: Outcomes, where: str) -> None:
    if not same(found, expected):
        outcomes.fail("other batches", where)
    elif left := list(cache.glob("*.part")):
        outcomes.fail("left over", f"{where}: {left}")
    else:
        outcomes["the same batches"] += 1


def sometimes(seed: int, share: float, kinds: list[Fault]) -> Faults:
    draw, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str, start: int) -> Fault | None:
        with lock:
            return draw.choice(kinds) if draw.random() < share else None

    return fault


@pytest.mark.parametrize(("share", "kinds"), [(0.05, KINDS), (0.3, ["cut", "short"])], ids=["5 %", "bodies cut short"])
def test_requests_that_fail(
    url: str, expected: list[Batch], faulty: FaultyProxy, tmp_path: Path, share: float, kinds: list[Fault]
) -> None:
    outcomes, requests = Outcomes(), 0
    for seed in seeds(size(1, 30)):
        faulty.reset(latency=0)
        faulty.fault = sometimes(seed, share, kinds)
        found = list(batches(url, tmp_path / f"{seed}"))
        requests += sum(bool(request.fault) for request in faulty.requests)
        check(found, expected, tmp_path / f"{seed}", outcomes, f"seed {seed}")
    outcomes.finish("store", f"{share:.0%} of the requests fail: {', '.join(kinds)}", faults=requests)


def test_spikes_of_latency(url: str, expected: list[Batch], faulty: FaultyProxy, tmp_path: Path) -> None:
    seconds, outcomes = 2.0 if LONG else 0.3, Outcomes()

    def fault(method: str, path: str, start: int) -> Fault | None:
        if draw.random() < 0.1:
            time.sleep(seconds)
        return None

    for seed in seeds(size(1, 5)):
        draw, faulty.fault = random.Random(seed), fault
        check(list(batches(url, tmp_path / f"{seed}")), expected, tmp_path / f"{seed}", outcomes, f"seed {seed}")
    outcomes.finish("store", f"a tenth of the requests takes {seconds} s longer")


def test_a_store_that_is_gone_for_a_while(url: str, expected: list[Batch], faulty: FaultyProxy, tmp_path: Path) -> None:
    seconds, outcomes = 60.0 if LONG else 2.0, Outcomes()
    for seed in seeds(size(1, 3)):
        found = []
        at = random.Random(seed).randrange(len(expected) // 2)
        for number, batch in enumerate(batches(url, tmp_path / f"{seed}")):
            found.append(batch)
            if number == at:
                faulty.go_away()
                back = threading.Timer(seconds, faulty.come_back)
                back.start()
        back.join()
        check(found, expected, tmp_path / f"{seed}", outcomes, f"seed {seed}")
    outcomes.finish("store", f"the store is gone for {seconds:.0f} s")


@pytest.mark.parametrize("kind", ["expired", "403"])
def test_credentials_that_expire(url: str, expected: list[Batch], faulty: FaultyProxy, tmp_path: Path, kind: Fault) -> None:
    """The run ends at once with one line that names the object. With new credentials it goes on with the copies that it has."""
    outcomes = Outcomes()
    for seed in seeds(size(1, 20)):
        faulty.reset(latency=0)
        left = random.Random(seed).randrange(12, 40)  # requests before that

        def fault(method: str, path: str, start: int) -> Fault | None:
            return kind if len(faulty.requests) > left else None  # noqa: B023  (called before the next round only)

        faulty.fault = fault
        with pytest.raises((OSError, ValueError)) as error:
            list(batches(url, tmp_path / f"{seed}"))
        refused = sum(request.fault == kind for request in faulty.requests)
        if url not in str(error.value) or "\n" in str(error.value):
            outcomes.fail("a bad message", f"seed {seed}: {error.value}")
        elif refused > 40:
            outcomes.fail("asked again and again", f"seed {seed}: {refused} requests")
        faulty.fault = lambda method, path, start: None
        check(list(batches(url, tmp_path / f"{seed}")), expected, tmp_path / f"{seed}", outcomes, f"seed {seed}")
    outcomes.finish("store", f"credentials expire ({kind})")


def test_an_object_that_changes(
    s3_bucket: str, shards: Path, expected: list[Batch], faulty: FaultyProxy, tmp_path: Path
) -> None:
    """The batches are those of the old objects, or the run ends with one line that names the object."""
    outcomes = Outcomes()
    for seed in seeds(size(2, 20)):
        url = upload(shards, f"{s3_bucket}/changing-{seed}", "train-*")
        draw, found = random.Random(seed), []
        at, victim = draw.randrange(6), draw.choice(sorted(shards.glob("train-*.tar")))
        try:
            for number, batch in enumerate(batches(url, tmp_path / f"{seed}")):
                found.append(batch)
                if number == at:
                    put(f"{url}/{victim.name}", victim.read_bytes()[:-10240] + bytes(10240 * draw.randrange(2, 4)))
        except (OSError, ValueError) as error:
            bad = victim.name not in str(error) or "\n" in str(error)
            outcomes.fail("a bad message", str(error)) if bad else outcomes.update(["refused by name"])
        if not same(found, expected[: len(found)]):
            outcomes.fail("other batches", f"seed {seed}")
        elif len(found) == len(expected):
            outcomes["the same batches"] += 1
    outcomes.finish("store", "an object changes during the run")
