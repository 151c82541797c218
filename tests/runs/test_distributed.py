"""Several ranks on one machine: they compute what one rank does, write one set of files, and survive a killed rank."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

import train
from model.checkpoint import load_checkpoint
from model.config import OptimConfig, StepConfig
from model.distributed import World, join_world
from model.job import HEADS, build_job
from pipelines.shards.index import read_index
from tests.helpers.command import run_main
from tests.helpers.runs import (
    alone,
    arguments,
    assert_same,
    environment,
    finish,
    is_equal,
    metrics,
    start,
    torchrun,
    wait_for_step,
    workers,
)
from tools.evaluate import cli

NUM_STEPS, SHARE = 6, 4


def make_steps(
    world: World, accumulate_steps: int, weights: tuple[float, ...] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns losses `(NUM_STEPS, len(HEADS))`, means over the global batch, and the final weights.

    A global batch consists of `world.size * accumulate_steps` shares of `SHARE` images, however the ranks divide it.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # with few images, normalization soon amplifies the rounding of float32
    config = StepConfig(
        accumulate_steps=accumulate_steps,
        batch_size=SHARE,
        optim=OptimConfig(lr=0.02, reference_batch_size=8, warmup_epochs=0),
        grad_clip=1.0,
    )
    options = {"classes": None, "class_weights": weights, "autocast_dtype": None}
    job = build_job(config, world, num_classes=3, steps_per_epoch=NUM_STEPS, **options)  # type: ignore[arg-type]
    for module in job.model.modules():
        if isinstance(module, torch.nn.Dropout):  # the auxiliary heads have no setting for it
            module.p = 0.0
    generator = torch.Generator().manual_seed(1)
    num_shares = world.size * accumulate_steps
    losses = []
    for _ in range(NUM_STEPS):
        images = torch.randn(num_shares, SHARE, 3, 32, 32, generator=generator)
        targets = torch.randint(3, (num_shares, SHARE), generator=generator)
        for share in range(world.rank, num_shares, world.size):
            is_complete = train.train_step(job, images[share], targets[share])
        assert is_complete
        sums = world.sum(job.sums.clone())
        losses.append(sums[: len(HEADS)] / sums[-1])
        job.sums.zero_()
    return torch.stack(losses), [parameter.detach() for parameter in job.parameters]


def rank_of_several(rank: int, num_ranks: int, port: int, folder: Path, weights: tuple[float, ...] | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_world("cpu") as world:
        torch.save(make_steps(world, 1, weights), folder / f"{rank}.pt")


@pytest.mark.parametrize(("num_ranks", "weights"), [(2, (0.25, 0.5, 2.0)), (3, None)])
def test_ranks_make_the_steps_of_one(tmp_path: Path, num_ranks: int, weights: tuple[float, ...] | None) -> None:
    """One rank that accumulates their batches normalizes over the same images, and makes the same steps."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_of_several, (num_ranks, port, tmp_path, weights), nprocs=num_ranks)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_ranks)]
    for losses, parameters in of_ranks[1:]:
        assert torch.equal(losses, of_ranks[0][0])
        assert is_equal(parameters, of_ranks[0][1])
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    try:
        losses, parameters = make_steps(world, num_ranks, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(of_ranks[0][0], losses, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(of_ranks[0][1], parameters, rtol=1e-7, atol=1e-7)


KEPT = ("--checkpoint.every-steps", 2, "--checkpoint.keep", 99, "--epochs", 3)


def run_of(num_ranks: int, shards: Path, run: Path, *more: object, options: tuple[str, ...] = ()) -> list[str]:
    """Returns the command of a run that keeps all checkpoints. Two ranks make 3 steps per epoch."""
    launcher = torchrun(num_ranks, *options) if num_ranks > 1 else alone()
    return [*launcher, *arguments(shards, run, *KEPT, *more)]


@pytest.fixture(scope="module")
def on_two(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an undisturbed run of two ranks, and its output."""
    run = tmp_path_factory.mktemp("two") / "run"
    return run, finish(start(run_of(2, shards, run), run.parent))


def check_run(run: Path, output: str, num_ranks: int, num_steps: int) -> None:
    lines = metrics(run)
    train = [(line["epoch"], line["step"]) for line in lines if line["split"] == "train"]
    assert train == [(1 + i // num_steps, 1 + i) for i in range(3 * num_steps)]  # each line once
    valid = [line for line in lines if line["split"] == "valid"]
    assert [line["epoch"] for line in valid] == [1, 2, 3]
    for line in valid:  # of 25 images
        assert all((line[name] * 25 / 100) % 1 == pytest.approx(0, abs=1e-9) for name in ("top1", "ema_top1"))
    last = load_checkpoint(run / "last.pt")
    assert len(last["ranks"]) == num_ranks
    positions = [
        (rank["loader"]["settings"]["rank"], rank["loader"]["epoch"], rank["loader"]["batch"]) for rank in last["ranks"]
    ]
    assert positions == [(rank, 3, 0) for rank in range(num_ranks)]
    assert len({str(rank["rng"]["cpu"].tolist()) for rank in last["ranks"]}) == num_ranks  # different dropout on each
    assert len(list(run.glob("events.*"))) == 2  # the second has the hyperparameters
    images, lr = 8 * num_ranks, 0.05 * 3 * num_steps / 300
    assert output.count(f"global batch size {images} (8 images x 1 batch x {num_ranks} processes); ") == 1
    assert output.count(f"learning rate {lr:g} x {images} / 64 = {lr * images / 64:g}\n") == 1
    assert output.count(f"epoch 3/3  step {num_steps}/{num_steps}") == 1
    assert output.count("the run: ") == 1


def test_two_ranks(on_two: tuple[Path, str]) -> None:
    check_run(*on_two, num_ranks=2, num_steps=3)


def test_three_ranks(shards: Path, tmp_path: Path) -> None:
    output = finish(start(run_of(3, shards, tmp_path / "run"), tmp_path))
    check_run(tmp_path / "run", output, num_ranks=3, num_steps=2)


def test_validation_has_each_sample_once(on_two: tuple[Path, str], shards: Path) -> None:
    """One process gives the weights the same scores as two ranks."""
    options = ("--json", "--device", "cpu", "--torch-threads", 1, "--batch-size", 8)
    found = json.loads(run_main(cli.main, on_two[0] / "last.pt", shards, *options).stdout)
    assert found["samples"] == 25
    line = metrics(on_two[0])[-1]
    for name in ("top1", "top5", "ema_top1", "ema_top5", "loss"):
        assert found[name] == pytest.approx(line[name], rel=1e-5)


def test_a_rank_that_is_killed(on_two: tuple[Path, str], shards: Path, tmp_path: Path) -> None:
    """The launcher ends the other rank. If it may restart them, the run continues and ends as if undisturbed."""
    run = tmp_path / "run"
    process = start(run_of(2, shards, run), tmp_path)
    wait_for_step(process, run, 4)
    os.kill(workers(process)[1], signal.SIGKILL)
    output = finish(process, 1)
    assert "exitcode  : -9" in output

    process = start(run_of(2, shards, run, options=("--max-restarts=1",)), tmp_path)
    wait_for_step(process, run, 8)
    os.kill(workers(process)[0], signal.SIGKILL)
    output = finish(process)
    first, second = map(int, re.findall(r"resuming after step (\d+)\n", output))
    assert first in (2, 3, 4)
    assert second >= 6
    assert_same(run, on_two[0])


LEFT_ALONE = """
import os
import torch
from model.distributed import join_world
from tools.cli import run_command

def command():
    with join_world("cpu") as world:
        world.sum(torch.ones(1))
        if world.rank == 1:
            os._exit(9)
        world.sum(torch.ones(1))
    return 0

run_command(command)
"""


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """Without torchrun, which would end the others first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LEFT_ALONE],
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 9, 1]
    for error in (errors[0], errors[2]):
        assert error.splitlines()[-1].startswith("error: no answer from rank 1 of 3 processes: ")


RESTARTED_WITH_ONE_LATE = """
import os, signal, sys, time
import torch
from model.distributed import join_world

is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if not is_first and os.environ["RANK"] == sys.argv[1]:
    time.sleep(3)
with join_world("cpu") as world:
    number = world.sum(torch.ones(1)).item()
    if is_first and world.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
    print(f"rank {world.rank} of {number:g}", flush=True)
"""


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_are_restarted_find_each_other(tmp_path: Path, late: int) -> None:
    """The store of torchrun survives. An early rank must not take the old address of the other from it."""
    [*launcher, _] = torchrun(2, "--max-restarts=1")
    output = finish(start([*launcher, "-c", RESTARTED_WITH_ONE_LATE, str(late)], tmp_path))
    assert sorted(re.findall(r"rank . of .", output)) == ["rank 0 of 2", "rank 1 of 2"]


def test_what_one_rank_alone_meets_is_said(shards: Path, tmp_path: Path) -> None:
    """The error ends the job, whatever the other rank waits for."""
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    [image, *_] = read_index(tmp_path / "train-000001.idx")[3]
    with open(tmp_path / "train-000001.tar", "r+b") as file:
        file.seek(image.offset)
        file.write(b"x" * image.size)
    command = [*torchrun(2), *arguments(tmp_path, tmp_path / "run", "--data.on-error", "stop")]
    output = finish(start(command, tmp_path), code=1)
    assert len(re.findall(r"^error: .*train-000001\.tar", output, re.MULTILINE)) == 1, output


def test_another_number_of_ranks(on_two: tuple[Path, str], shards: Path, tmp_path: Path) -> None:
    """A resumed run may have another number of ranks if the images per step stay the same."""
    run = tmp_path / "run"
    shutil.copytree(on_two[0], run)
    one = run_of(1, shards, run, "--accumulate-steps", 2)
    states = run / "checkpoints"

    def keep_up_to(step: int) -> None:
        for path in states.glob("step-*.pt"):
            if path.name > f"step-{step:09d}.pt":
                path.unlink()

    keep_up_to(4)
    status, printed, output = run_main(train.main, *arguments(shards, run, *KEPT))
    assert (status, printed) == (2, "")
    what = "the run was started with 16 images a step, and now there are 8; (processes) x --batch-size x --accumulate-steps"
    assert output == f"error: --resume auto: {what} has to stay the same\n"
    assert metrics(run) == metrics(on_two[0])

    output = finish(start(one, tmp_path))
    assert "resuming after step 4\n" in output
    assert "global batch size 16 (8 images x 2 batches x 1 process)" in output
    assert metrics(run)[:5] == metrics(on_two[0])[:5]
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(on_two[0])]

    keep_up_to(6)
    output = finish(start(run_of(1, shards, run, "--batch-size", 16), tmp_path))
    assert "resuming after step 6\n" in output
    assert "global batch size 16 (16 images x 1 batch x 1 process)" in output

    keep_up_to(6)
    output = finish(start(run_of(2, shards, run), tmp_path))
    assert "resuming after step 6\n" in output
    [rank, other] = load_checkpoint(run / "last.pt")["ranks"]
    assert not torch.equal(rank["rng"]["cpu"], other["rng"]["cpu"])  # otherwise both would draw the same dropout
