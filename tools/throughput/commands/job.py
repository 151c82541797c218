"""What the commands that measure training have in common: options of train.py, and the settings that they make."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tools.throughput.commands.output import Output

if TYPE_CHECKING:
    from tools.run.config import Config

T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """What of the network its speed depends on."""

    aux_logits: bool = True
    """Train with the two auxiliary heads."""


@dataclass(frozen=True, kw_only=True)
class Job(Output):
    """What the speed of every training job depends on."""

    batch_size: int = 0
    """As --batch-size of train.py."""
    image_size: int = 224
    """As --image-size of train.py."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --device of train.py."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """As --precision of train.py."""
    torch_threads: int | None = None
    """As --torch-threads of train.py. With 1, other processes disturb least."""


def trainer_config(options: Output) -> "Config":
    """The trainer's settings, as the options have them that have the same names."""
    from tools.run.config import Config, ModelConfig

    common = (_names(options) - _names(Output)) & _names(Config)
    values = {name: getattr(options, name) for name in common}
    if "model" in values:
        values["model"] = ModelConfig(**dataclasses.asdict(values["model"]))
    return Config(epochs=1000, **values)  # the schedule goes on all the time


def _names(settings: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def by_device(given: T | None, device: str, *, gpu: T, cpu: T) -> T:
    """What is given, or else what takes a minute or so on such a device."""
    return given if given is not None else gpu if device == "cuda" else cpu
