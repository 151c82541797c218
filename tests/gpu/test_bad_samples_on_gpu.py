"""Samples that cannot be used, met by the GPU's decoders."""

from pathlib import Path

import pytest
import torch

from tests.loader_contract import same, saved, take
from tests.test_bad_samples import NUM_KINDS, damage, encoded_images, epochs, make, without, write_shards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", range(NUM_KINDS))
def test_left_out_and_all_else_is_as_if_they_were_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, bad = encoded_images(tmp_path / "images", 60), {0, 17, 18, 44}
    good = write_shards(tmp_path / "good", images)
    damaged = write_shards(tmp_path / "bad", [damage(image, kind) if i in bad else image for i, image in enumerate(images)])
    undisturbed = epochs(make(good, device=GPU), 3)
    with make(damaged, device=GPU) as loader:
        batches, states = [], []
        for _ in range(30):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
        assert loader.num_bad_samples == len(bad)
    assert same(batches, without(undisturbed, bad))
    with make(damaged, device=GPU) as resumed:
        resumed.load_state_dict(states[14])
        assert same(take(resumed, 10), batches[14:24])
