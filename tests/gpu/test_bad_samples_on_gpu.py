"""Bad samples in the decoders of a GPU."""

from pathlib import Path

import pytest
import torch

from pipelines.loader import Batch
from tests.helpers.loader_contract import saved, take
from tests.pipelines.test_bad_samples import NUM_KINDS, damage, encoded_images, epochs, make, without, write_shards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)


def alike(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Compares targets exactly and pixels closely. A batch's content decides which decoder gets which of its images."""
    return len(ours) == len(theirs) and all(
        torch.equal(a["target"], b["target"]) and (a["image"].float() - b["image"].float()).abs().mean() < 0.02
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_bad_samples_are_left_out_by_every_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float) -> None:
    """Every kind of damage is found, and the other samples are the same as without damage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, bad = encoded_images(tmp_path / "images", 60), {0, 16, 17, 18, 44}
    assert {number % NUM_KINDS for number in bad} == set(range(NUM_KINDS))
    good = write_shards(tmp_path / "good", images)
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    intact = epochs(make(good, device=GPU, hw_decoder_load=load), 3)
    with make(damaged, device=GPU, hw_decoder_load=load) as loader:
        batches, states = [], []
        for _ in range(30):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
        assert loader.num_bad_samples == len(bad)
    assert alike(batches, without(intact, bad))
    with make(damaged, device=GPU, hw_decoder_load=load) as resumed:
        resumed.load_state_dict(states[14])
        assert alike(take(resumed, 10), batches[14:24])
