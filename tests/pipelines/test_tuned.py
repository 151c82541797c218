"""Settings that change the loader's speed alone: prefetch, the load of the hardware's decoder, and the file of both."""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from nvidia.dali import backend

from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.dali.graph import image_pipeline
from pipelines.tuned import HW_DECODER_LOAD, PREFETCH, Tuned
from tests.helpers.loader_contract import make_loader, same, saved, take
from tests.helpers.runs import alone, arguments, assert_same, finish, start

CPU = torch.device("cpu")
CORES = len(os.sched_getaffinity(0))


def tuned_file(path: Path, **settings: Any) -> Path:
    """A file as `throughput tune` writes it on this machine."""
    Tuned(**{"device": "cpu", "gpu": None, "cores": CORES, **settings}).write(path)
    return path


def first_batches(shards: Path, **data: Any) -> list[Any]:
    with make_loader(shards, "dali", "train", CPU, data=data) as loader:
        return take(loader, 16)


@pytest.mark.parametrize("prefetch", [1, 2, 4, 9])
def test_prefetch_changes_no_batch(shards: Path, prefetch: int) -> None:
    """Over several epochs, of fewer batches than the queue holds."""
    assert same(first_batches(shards, prefetch=prefetch), first_batches(shards))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (None, 3), (3, None)])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_resumed_with_another_depth(shards: Path, split: str, before: int | None, after: int | None) -> None:
    with make_loader(shards, "dali", split, CPU, data={"prefetch": before}) as loader:
        batches, states = [], []
        for _ in range(12):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
    for position in range(10):
        with make_loader(shards, "dali", split, CPU, data={"prefetch": after}) as resumed:
            resumed.load_state_dict(states[position])
            assert same(take(resumed, 2), batches[position : position + 2]), position


@pytest.mark.parametrize("split", ["train", "valid"])
def test_load_of_the_decoder_in_hardware(shards: Path, split: Literal["train", "valid"]) -> None:
    """It is in the graph that a GPU runs, and DALI's own without the setting; what it does there is in tests/gpu."""

    def graph(load: float | None) -> bytes:
        pipeline = image_pipeline(
            train=split == "train",
            device="gpu",
            image_size=32,
            dtype=torch.float32,
            config=DataConfig(hw_decoder_load=load),
            batch_size=2,
            num_threads=1,
            device_id=None,
        )
        return bytes(pipeline.serialize())

    argument = b"hw_decoder_load\x12\x05float\x1d"
    assert argument + struct.pack("<f", 0.3125) in graph(0.3125)
    assert argument not in graph(None)
    assert same(first_batches(shards, hw_decoder_load=0.3125), first_batches(shards))  # a CPU has none
    for decoder in ("Image", "ImageRandomCrop"):
        schema = backend.GetSchema(f"decoders__{decoder}")
        assert float(schema.GetArgumentDefaultValueString("hw_decoder_load")) == pytest.approx(HW_DECODER_LOAD)


def test_prefetch_is_dalis_without_the_setting(shards: Path) -> None:
    for prefetch, depth in ((None, PREFETCH), (5, 5)):
        with make_loader(shards, "dali", "train", CPU, data={"prefetch": prefetch}) as loader:
            take(loader, 1)
            assert loader._pipeline._pipeline.prefetch_queue_depth == depth  # type: ignore[attr-defined]


def test_flags_win_over_the_file(tmp_path: Path, shards: Path) -> None:
    file = tuned_file(tmp_path / "tuned.json", threads=3, prefetch=4)
    options = ("--data.tuned", file, "--data.threads", 1, "--epochs", 1)
    log = finish(start([*alone(), *arguments(shards, tmp_path / "run", *options)], tmp_path))
    assert f"tuned by {file}: threads 3, prefetch 4; given, and not taken from it: --data.threads\n" in log
    assert "1 torch and 1 data threads" in log
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["threads"], data["prefetch"], data["hw_decoder_load"]) == (1, 4, None)


def test_resumed_with_and_without(tmp_path: Path, shards: Path) -> None:
    """And evaluated with it; the metrics and the weights are those of a run that never heard of it."""
    file = tuned_file(tmp_path / "tuned.json", threads=3, prefetch=4)
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    finish(start([*alone(), *arguments(shards, plain)], tmp_path))
    script = """
import os, signal, train
real = train.train_step
def train_step(job, image, target):
    if job.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(job, image, target)
train.train_step = train_step
train.main()
"""
    finish(start([*alone(script), *arguments(shards, tuned, "--data.tuned", file)], tmp_path), 75)
    finish(start([*alone(), *arguments(shards, tuned)], tmp_path))
    assert_same(plain, tuned)
    evaluation = ["--evaluate", tuned / "last.pt", "--data.valid", shards, "--device", "cpu", "--data.tuned", file]
    said = finish(start([*alone(), *map(str, evaluation)], tmp_path))
    assert f"tuned by {file}: threads 3, prefetch 4\n" in said


GOOD = {"device": "cpu", "gpu": None, "cores": CORES, "threads": 2, "prefetch": 3, "hw_decoder_load": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; `throughput tune -o "),
        ("{", "not JSON (Expecting property name"),
        ("[1]", "not a JSON object; `throughput tune -o "),
        ({**GOOD, "treads": 3}, "unknown key 'treads'; there are device, gpu, cores, threads, prefetch, hw_decoder_load"),
        ({name: value for name, value in GOOD.items() if name != "cores"}, "cores is missing; `throughput tune -o "),
        ({**GOOD, "threads": 0}, "threads 0: a whole number from 1 on, or null is needed"),
        ({**GOOD, "threads": True}, "threads true: a whole number from 1 on, or null is needed"),
        ({**GOOD, "prefetch": 2.5}, "prefetch 2.5: a whole number from 1 on, or null is needed"),
        ({**GOOD, "hw_decoder_load": 1.5}, "hw_decoder_load 1.5: a number from 0 to 1, or null is needed"),
        ({**GOOD, "device": "tpu"}, 'device "tpu": "cpu" or "cuda" is needed'),
        ({**GOOD, "gpu": 3}, "gpu 3: a name or null is needed"),
        (
            {**GOOD, "device": "cuda", "gpu": "NVIDIA A100"},
            " is of another kind of device: cuda, and this is cpu; tune again here",
        ),
    ],
)
def test_files_that_are_of_no_use(tmp_path: Path, shards: Path, content: Any, message: str) -> None:
    file = tmp_path / "tuned.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"--data.tuned {file}") + ":? ?" + re.escape(message)):
        make_loader(shards, "dali", "train", CPU, data={"tuned": str(file)})


def test_a_file_of_no_use_ends_the_run_in_one_line(tmp_path: Path, shards: Path) -> None:
    output = finish(start([*alone(), *arguments(shards, tmp_path / "run", "--data.tuned", "none.json")], tmp_path), 1)
    assert output == "error: --data.tuned none.json: there is no such file; `throughput tune -o none.json` writes one\n"


def test_another_machine_is_a_warning(tmp_path: Path, shards: Path) -> None:
    file = tuned_file(tmp_path / "tuned.json", cores=CORES + 1, gpu="NVIDIA A100")
    log = finish(start([*alone(), *arguments(shards, tmp_path / "run", "--data.tuned", file, "--epochs", 1)], tmp_path))
    assert f"tuned by {file}: the defaults\n" in log
    difference = f"on NVIDIA A100, not on a CPU and with {CORES + 1} cores a process, not {CORES}"
    assert f"--data.tuned {file} was found {difference}; tune again here with `throughput tune`\n" in log


def test_build_loader_takes_the_threads(tmp_path: Path, shards: Path) -> None:
    file = tuned_file(tmp_path / "tuned.json", threads=3)
    options: dict[str, Any] = {"batch_size": 8, "image_size": 32, "device": CPU}
    for data, more, threads in (
        ({"tuned": str(file)}, {}, 3),
        ({"threads": 2}, {}, 2),
        ({"threads": 2}, {"num_threads": 1}, 1),
    ):
        with build_loader(DataConfig(train=str(shards), **data), "train", **options, **more) as loader:
            assert loader._settings.num_threads == threads  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefetch": 0}, "--data.prefetch 0: at least 1 is needed"),
        ({"hw_decoder_load": 1.5}, "--data.hw-decoder-load 1.5: a number from 0 to 1 is needed"),
        ({"prefetch": 3, "backend": "pillow"}, "--data.prefetch: only --data.backend dali has it, pillow has not"),
        ({"tuned": "t.json", "backend": "synthetic"}, "--data.tuned: only --data.backend dali has it, synthetic has not"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
