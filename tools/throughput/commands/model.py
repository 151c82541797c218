"""The options of `throughput model`."""

from dataclasses import dataclass
from typing import Literal

from tools.throughput.commands.job import Network, by_device, trainer_config
from tools.throughput.commands.output import Output


@dataclass(frozen=True)
class Model(Output):
    """Measure the training step alone, over precisions and batch sizes, on batches that lie on the device.

    A matrix product in the same precision, which takes turns with the steps, says what the device's arithmetic can do.
    """

    batch_sizes: tuple[int, ...] = ()
    """Images a step; by default 64 128 256 512 on a GPU, 16 32 on a CPU."""
    precisions: tuple[Literal["fp32", "tf32", "bf16", "fp16"], ...] = ()
    """As --precision of train.py; tf32 and fp16 need a GPU. By default tf32 bf16 on a GPU, fp32 on a CPU."""
    image_size: int = 224
    """Side of the images, pixels."""
    model: Network = Network()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --device of train.py."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """As --compile of train.py."""
    torch_threads: int | None = None
    """CPU threads for the arithmetic; by default torch's own choice."""
    steps: int | None = None
    """Steps of a turn; by default 20 on a GPU, 2 on a CPU."""
    rounds: int = 5
    """Turns of each precision with each batch size."""

    def run(self) -> int:
        self.check()
        if min(self.batch_sizes, default=2) < 2:
            raise ValueError(f"--batch-sizes {' '.join(map(str, self.batch_sizes))}: sizes from 2 on are needed")
        from model.distributed import choose_device
        from tools.throughput.model import benchmark

        device = choose_device(self.device).type
        steps = by_device(self.steps, device, gpu=20, cpu=2)
        if steps < 1 or self.rounds < 1:
            raise ValueError(f"--steps {steps} --rounds {self.rounds}: at least 1 of each is needed")
        batch_sizes = by_device(self.batch_sizes or None, device, gpu=(64, 128, 256, 512), cpu=(16, 32))
        precisions = by_device(self.precisions or None, device, gpu=("tf32", "bf16"), cpu=("fp32",))
        sizes, kinds = [*dict.fromkeys(batch_sizes)], [*dict.fromkeys(precisions)]
        self.publish(benchmark(trainer_config(self), batch_sizes=sizes, precisions=kinds, steps=steps, rounds=self.rounds))
        return 0
