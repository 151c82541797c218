"""DALI's random draws for a sample depend only on seed, epoch and place."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.augment import AUGMENTATIONS, Augmentation
from pipelines.config import DataConfig
from pipelines.dali.cpu_resize import WholeResize
from pipelines.dali.draws import DRAWING
from pipelines.dali.image_pipeline import ImagePipeline
from pipelines.dali.operators import Preprocessing
from pipelines.dali.part import Graph
from pipelines.spec import LoaderSpec
from tests.conftest import write_image

EVERY = tuple(kind() if name != "color-jitter" else kind(0.4, 0.4, 0.4, 0.1) for name, kind in AUGMENTATIONS.items())
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> list[NDArray[np.uint8]]:
    folder = tmp_path_factory.mktemp("images")
    for i in range(NUM_IMAGES):
        write_image(folder / f"{i}.jpg", i, (50 + i, 90 - i))
    return [np.frombuffer((folder / f"{i}.jpg").read_bytes(), np.uint8) for i in range(NUM_IMAGES)]


def pipeline(batch_size: int, augment: tuple[Augmentation, ...] = EVERY, seed: int = 0, num_threads: int = 2) -> ImagePipeline:
    options = {"batch_size": batch_size, "image_size": 32, "num_threads": num_threads, "seed": seed}
    spec = LoaderSpec(split="train", device=torch.device("cpu"), **options)
    return ImagePipeline(DataConfig(augment=augment), spec)


def run(made: ImagePipeline, images: list[NDArray[np.uint8]], place: int, epoch: int = 0) -> NDArray[np.float32]:
    made.feed(images, epoch, place)
    return made.images().numpy()


@pytest.mark.parametrize("augment", [EVERY, *((step,) for step in EVERY)], ids=lambda steps: "+".join(s.name for s in steps))
def test_a_sample_is_the_same_in_any_batch(encoded: list[NDArray[np.uint8]], augment: tuple[Augmentation, ...]) -> None:
    """The batch may have any size, follow any other batches, run in another pipeline, and contain other images."""
    together = run(pipeline(NUM_IMAGES, augment), encoded, 0)
    made = pipeline(10, augment, num_threads=1)
    for first, last in ((20, 24), (3, 13), (0, 1), (7, 9)):
        np.testing.assert_array_equal(run(made, encoded[first:last], first), together[first:last])
    others = run(made, [encoded[5], encoded[1], encoded[7]], 5)
    np.testing.assert_array_equal(others[[0, 2]], together[[5, 7]])
    assert not np.array_equal(others[1], together[6])
    made.close()


def test_places_epochs_seeds_and_operators_draw_differently(encoded: list[NDArray[np.uint8]]) -> None:
    same = [encoded[0]] * 20
    made = pipeline(20, ())
    found = [run(made, same, 0), run(made, same, 20), run(made, same, 0, epoch=1), run(made, same, 2**40)]
    found.append(run(pipeline(20, (), seed=1), same, 0))
    images = np.concatenate(found)
    assert len({image.tobytes() for image in images}) == len(images) == 100


def test_two_flips_are_drawn_apart(encoded: list[NDArray[np.uint8]]) -> None:
    """Two operators of one kind draw independently, so they cancel out in half of the images only."""
    flip = AUGMENTATIONS["vertical-flip"]
    images = [encoded[0]] * 400
    none, two = (run(pipeline(400, steps), images, 0) for steps in ((), (flip(), flip())))
    unchanged = (none == two).all(axis=(1, 2, 3)).sum()
    assert 160 < unchanged < 240


def test_other_random_operators_are_refused(tmp_path: Path) -> None:
    """Their draws could not be reproduced. A process of its own keeps the augmentation out of the other tests' list."""
    script = """
import torch
from dataclasses import dataclass
from pipelines.config import DataConfig
from pipelines.augment import Augmentation
from pipelines.dali.image_pipeline import ImagePipeline
from pipelines.spec import LoaderSpec

@dataclass(frozen=True)
class Noise(Augmentation):
    def __call__(self, images):
        from nvidia.dali import fn

        return fn.cast_like(images + fn.random.normal(images), images)

spec = LoaderSpec(split="train", batch_size=2, image_size=32, device=torch.device("cpu"), num_threads=1)
ImagePipeline(DataConfig(augment=(Noise(),)), spec)
"""
    (tmp_path / "script.py").write_text(script)  # DALI translates an augmentation from its file
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, check=False)
    message = (
        r"ValueError: .* use the random operators .*random\.Normal.*, of which only uniform, coin_flip, image_random_crop are"
    )
    assert re.match(message, done.stderr.splitlines()[-1]), done.stderr


def test_no_operator_draws_by_itself() -> None:
    """In a graph with every augmentation, each random operator is fed the state of its generator."""
    config, spec = DataConfig(augment=EVERY), LoaderSpec(split="train", batch_size=2, device=torch.device("cpu"))
    graph = Graph(config, spec, Preprocessing(), WholeResize(size=32), "normalize", batch_size=2, num_threads=1)
    drawing = [instance for instance in graph._pipeline._ops if instance._op.schema.HasRandomStateArg()]
    assert len(drawing) == len(graph._draws.names) > 12
    # The functions were restored after the graph was built.
    assert all(getattr(module, name).__module__.startswith("nvidia.") for module, name in DRAWING)
