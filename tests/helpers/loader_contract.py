"""Tests for every loader on any device: base classes that need the fixtures `backend`, `device` and `dtype`."""

import gc
import io
import os
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Batch, Loader
from pipelines.shards.shard_set import open_shards

NUM_TRAIN, NUM_VALID, BATCH_SIZE, IMAGE_SIZE = 61, 25, 8, 48


class Make(Protocol):
    """Builds a loader of the test shards. Options are those of `LoaderSpec`, and `data` with fields of `DataConfig`."""

    def __call__(self, split: str, **options: Any) -> Loader: ...


def make_loader(
    shards: Path, backend: str, split: str, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> Loader:
    config = DataConfig(**{"train": str(shards), "valid": str(shards), "backend": backend, **options.pop("data", {})})
    settings = {"batch_size": BATCH_SIZE, "image_size": IMAGE_SIZE, "num_threads": 2 if backend == "dali" else 0, **options}
    return build_loader(config, LoaderSpec(split=split, device=device, dtype=dtype, **settings))  # type: ignore[arg-type]


def take(loader: Loader, count: int) -> list[Batch]:
    """Returns the next batches, across epochs."""
    batches: list[Batch] = []
    while len(batches) < count:
        batch = loader.next()
        if batch is None:
            loader.reset()
        else:
            batches.append(batch)
    return batches


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Whether two lists of batches are equal bit for bit."""
    return len(ours) == len(theirs) and all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"]) for a, b in zip(ours, theirs, strict=True)
    )


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Writes and reads a loader's state like a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 16 * 1024
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def count_threads() -> int:
    """Returns the number of threads of this process, native ones included."""
    return len(os.listdir("/proc/self/task"))


def resident_bytes() -> int:
    """Returns the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class LoaderContract:
    @pytest.fixture
    def make(self, shards: Path, backend: str, device: torch.device, dtype: torch.dtype) -> Make:
        def make(split: str, **options: Any) -> Loader:
            return make_loader(shards, backend, split, device, dtype, **options)

        return make

    def test_batches(self, make: Make, device: torch.device, dtype: torch.dtype) -> None:
        """Keys, shapes, dtypes, strides and device are right, and images are normalized."""
        with make("train") as loader:
            for batch in loader:
                assert set(batch) == {"image", "target"}
                assert batch["image"].shape == (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
                assert batch["image"].dtype == dtype
                assert batch["image"].device == device
                assert batch["image"].is_contiguous(memory_format=torch.channels_last)
                assert batch["target"].shape == (BATCH_SIZE,)
                assert batch["target"].dtype == torch.int64
                assert batch["target"].device == device
                assert set(batch["target"].tolist()) <= {0, 1, 2}
                assert -2.2 < batch["image"].min().item() < batch["image"].max().item() < 2.7
                assert batch["image"].float().std().item() > 0.2

    def test_epochs(self, make: Make) -> None:
        """Length, end of an epoch, reset, and leaving an epoch early."""
        with make("train") as loader:
            assert len(loader) == NUM_TRAIN // BATCH_SIZE
            for _ in range(3):
                assert sum(len(batch["target"]) for batch in loader) == len(loader) * BATCH_SIZE
            assert loader.next() is None
            assert loader.next() is None
            loader.reset()
            loader.reset()
            assert loader.next() is not None
        with make("valid") as loader:
            assert len(loader) == -(-NUM_VALID // BATCH_SIZE)
            whole = [batch["target"].tolist() for batch in loader]
            assert [len(targets) for targets in whole] == [8, 8, 8, 1]
            for count, batch in enumerate(loader):
                assert batch["target"].tolist() == whole[count]
                if count == 1:
                    break
            assert [batch["target"].tolist() for batch in loader] == whole

    def test_ancestors_loop(self, make: Make) -> None:
        """The unchanged training loop of the notebook's ancestor works over two epochs."""
        train_prefetcher = make("train")
        for _ in range(2):
            batch_index = 0
            train_prefetcher.reset()
            batch = train_prefetcher.next()
            while batch is not None:
                images = batch["image"]
                target = batch["target"]
                assert len(images) == len(target) == BATCH_SIZE
                batch = train_prefetcher.next()
                batch_index += 1
            assert batch_index == len(train_prefetcher)
        train_prefetcher.close()

    def test_batches_stay(self, make: Make) -> None:
        """Later batches do not overwrite a batch that the caller keeps."""
        with make("valid") as loader:
            kept: list[Batch] = list(loader)
            copies = [batch["image"].clone() for batch in kept]
            for _ in range(3):
                list(loader)
            assert all(torch.equal(batch["image"], copy) for batch, copy in zip(kept, copies, strict=True))

    @pytest.mark.parametrize("split", ["train", "valid"])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_resumed_at_every_position(self, make: Make, split: str, world_size: int) -> None:
        """A resumed loader gives the same batches bit for bit, also across epochs with a smaller last batch."""
        for rank in range(world_size):
            with make(split, rank=rank, world_size=world_size) as loader:
                count = 2 * len(loader) + 1
                batches, states = [], [saved(loader.state_dict())]
                for _ in range(count + 2):
                    batches += take(loader, 1)
                    states.append(saved(loader.state_dict()))
            for position in range(count):
                with make(split, rank=rank, world_size=world_size) as resumed:
                    resumed.load_state_dict(states[position])
                    assert same(take(resumed, 2), batches[position : position + 2]), (rank, position)

    def test_resumed_loop(self, make: Make) -> None:
        """`for batch in loader` continues from the position, then with whole epochs. A loader in use can go back, too."""
        with make("train") as loader:
            first = list(loader)
            second = take(loader, 3)
            state = loader.state_dict()
            second += list(iter(loader.next, None))
            loader.load_state_dict(state)
            assert same(list(loader), second[3:])
            third = list(loader)
            assert len(third) == len(first)
        with make("train") as resumed:
            resumed.load_state_dict(state)
            assert same(list(resumed), second[3:])
            assert same(list(resumed), third)

    def test_epochs_do_not_depend_on_what_was_before(self, make: Make) -> None:
        """Leaving an epoch early does not change the next one."""
        with make("train") as loader:
            whole = [list(loader) for _ in range(3)]
        with make("train") as loader:
            take(loader, 1)
            loader.reset()
            take(loader, 2)
            loader.reset()
            assert same(list(loader), whole[2])

    def test_another_number_of_ranks_from_the_beginning_of_an_epoch(self, make: Make) -> None:
        with make("train") as loader:
            list(loader)
            state = saved(loader.state_dict())
        for rank in range(3):
            with make("train", rank=rank, world_size=3) as fresh, make("train", rank=rank, world_size=3) as resumed:
                list(fresh)
                resumed.load_state_dict(state)
                assert same(list(resumed), list(fresh))

    def test_less_than_a_batch_is_left(self, make: Make) -> None:
        """If less than one of the new, larger global batches is left, the next epoch begins."""
        with make("train") as loader:
            take(loader, 6)
            state = saved(loader.state_dict())
        with make("train", batch_size=20) as loader, make("train", batch_size=20) as fresh:
            loader.load_state_dict(state)
            list(fresh)
            assert same(list(loader), list(fresh))
            assert len(list(loader)) == 3

    def test_two_at_once(self, make: Make) -> None:
        """Training and validation loaders do not affect each other, and closing them ends their threads."""
        with make("valid") as alone:
            expected = [batch["target"].tolist() for batch in alone]
        gc.collect()
        threads = count_threads()
        with make("train") as train, make("valid") as valid:
            interleaved = [v["target"].tolist() for _, v in zip(train, valid, strict=False)]
        assert interleaved == expected[: len(interleaved)]
        gc.collect()
        assert count_threads() <= threads

    @pytest.mark.parametrize("world_size", [1, 2, 3, 7])
    def test_ranks_have_equally_many_training_batches(self, make: Make, world_size: int) -> None:
        for rank in range(world_size):
            with make("train", rank=rank, world_size=world_size) as loader:
                assert len(loader) == NUM_TRAIN // world_size // BATCH_SIZE
                for _ in range(3):
                    assert len(list(loader)) == len(loader)

    def test_too_few_training_samples(self, make: Make) -> None:
        with pytest.raises(ValueError, match=r"61 training samples cannot fill one batch of 62"):
            make("train", batch_size=62)

    def test_nothing_leaks(self, make: Make, device: torch.device) -> None:
        """Memory, threads and open files do not grow over 200 epochs."""
        with make("train", batch_size=20, image_size=32) as train, make("valid", image_size=32) as valid:
            used = []
            for epoch in range(200):
                assert sum(1 for _ in train) == 3
                assert sum(1 for _ in valid) == 4
                if epoch % 50 == 49:
                    gc.collect()
                    used.append((count_threads(), len(os.listdir("/proc/self/fd")), resident_bytes()))
        threads, files, memory = zip(*used, strict=True)
        # The next epoch's pipeline may exist already: 3 threads, and on a GPU those of its decoder.
        assert max(threads) <= min(threads) + (6 if device.type == "cpu" else 20), threads
        assert max(files) <= min(files) + 8, files
        assert memory[-1] - memory[0] < 20 * 2**20, memory


class ShardLoaderContract(LoaderContract):
    """Tests for loaders that read shards."""

    def test_reproducible(self, make: Make) -> None:
        """The seed determines the batches, and epochs differ."""

        def first_epochs(seed: int) -> list[torch.Tensor]:
            with make("train", seed=seed) as loader:
                return [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]

        first, again, other = first_epochs(0), first_epochs(0), first_epochs(1)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], other[0])

    def test_states_of_something_else_are_refused(self, make: Make) -> None:
        with make("train", seed=1) as loader:
            take(loader, 2)
            state = saved(loader.state_dict())
        different: list[tuple[dict[str, Any], str]] = [
            ({"seed": 2}, "another seed: 1, now 2"),
            ({"seed": 1, "image_size": 64}, "another image size: 48, now 64"),
        ]
        for options, message in different:
            with make("train", **options) as loader, pytest.raises(ValueError, match=message):
                loader.load_state_dict(state)
        with (
            make("valid", seed=1) as loader,
            pytest.raises(ValueError, match=r"another data set: 61 samples.*, now 25 samples"),
        ):
            loader.load_state_dict(state)
        with make("train", seed=1) as loader, pytest.raises(ValueError, match="not the state of a loader"):
            loader.load_state_dict({"epoch": 1})
        with make("valid") as loader:
            take(loader, 2)
            state = saved(loader.state_dict())
        different = [
            ({"batch_size": 4}, "another batch size: 8, now 4"),
            ({"world_size": 2}, "another number of ranks: 1, now 2; only a state at the beginning of an epoch"),
        ]
        for options, message in different:
            with make("valid", **options) as loader, pytest.raises(ValueError, match=message):
                loader.load_state_dict(state)

    def test_other_numbers_of_ranks_go_on_with_the_same_global_batches(self, make: Make) -> None:
        """Loaders of 2, 3, 1, 3 and 2 ranks resume each other, within and across epochs, and match an uninterrupted one."""
        with make("train", batch_size=12) as undisturbed:
            expected = take(undisturbed, 12)
        found, state = list[Batch](), None
        for world_size, count in ((2, 2), (3, 4), (1, 2), (3, 1), (2, 3)):
            of_ranks, states = [], []
            for rank in range(world_size):
                with make("train", batch_size=12 // world_size, rank=rank, world_size=world_size) as loader:
                    if state is not None:
                        loader.load_state_dict(state)
                    of_ranks.append(take(loader, count))
                    states.append(saved(loader.state_dict()))
            state = states[-1]  # any rank's state will do
            for parts in zip(*of_ranks, strict=True):
                image, target = (torch.cat([part[name] for part in parts]) for name in ("image", "target"))  # type: ignore[literal-required]
                found.append({"image": image, "target": target})
        assert same(found, expected)

    def test_every_valid_sample_exactly_once(self, make: Make, shards: Path) -> None:
        """Over all ranks, validation gives each sample once per epoch, in order, at any batch size, without empty batches."""
        targets = open_shards(str(shards), "valid").labels()
        for world_size in (1, 2, 3, 7, 30):
            for batch_size in (4, 25):
                seen: list[list[int]] = [[], []]
                for rank in range(world_size):
                    with make("valid", batch_size=batch_size, rank=rank, world_size=world_size) as loader:
                        for epoch in seen:
                            batches = [batch["target"].tolist() for batch in loader]
                            assert len(batches) == len(loader)
                            assert all(batches)
                            for batch in batches:
                                epoch += batch
                assert seen == [targets] * 2, (world_size, batch_size)
