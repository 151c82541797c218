"""What `throughput tune` has found out about a machine: the file that `--data.tuned` takes."""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.files import replace_text

if TYPE_CHECKING:  # torch takes seconds to import, and a tool's --help needs none of it
    import torch

    from pipelines.config import DataConfig

PREFETCH, HW_DECODER_LOAD = 2, 0.65  # DALI's own, where nothing is said
Device = Literal["cpu", "cuda"]
SETTINGS = ("threads", "prefetch", "hw_decoder_load")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


# What each key may be, in words and checked.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "device": ('"cpu" or "cuda"', lambda value: value in ("cpu", "cuda")),
    "gpu": ("a name or null", lambda value: value is None or isinstance(value, str)),
    "cores": ("a whole number from 1 on", _is_count),
    "threads": ("a whole number from 1 on, or null", lambda value: value is None or _is_count(value)),
    "prefetch": ("a whole number from 1 on, or null", lambda value: value is None or _is_count(value)),
    "hw_decoder_load": ("a number from 0 to 1, or null", lambda value: value is None or _is_share(value)),
}


@dataclass(frozen=True)
class Tuned:
    """Settings of `DataConfig`, and what they were found on.

    Attributes:
        device: Its kind.
        gpu: The GPU's model, if it was one.
        cores: That the process had.
        threads: As --data.threads; None, as for the others, is the default.
        prefetch: As --data.prefetch.
        hw_decoder_load: As --data.hw-decoder-load.
    """

    device: Device
    gpu: str | None
    cores: int
    threads: int | None = None
    prefetch: int | None = None
    hw_decoder_load: float | None = None

    def __str__(self) -> str:
        found = [f"{name} {getattr(self, name)}" for name in SETTINGS if getattr(self, name) is not None]
        return ", ".join(found) or "the defaults"

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        replace_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def cores_of_a_process(processes: int) -> int:
    """CPUs for each of so many processes of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def gpu_model(device: "torch.device") -> str | None:
    """Of a GPU its name, of a CPU None."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name(device)


def read_tuned(path: str) -> Tuned:
    """The file of `--data.tuned`.

    Raises:
        ValueError: It is not there, or not such a file.
    """
    place, again = f"--data.tuned {path}", f"`throughput tune -o {path}` writes one"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{place}: there is no such file; {again}") from None
    except OSError as error:
        raise ValueError(f"{place}: {error.strerror}; {again}") from None
    except ValueError as error:  # of the JSON, or of UTF-8
        raise ValueError(f"{place}: not JSON ({error}); {again}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place}: not a JSON object; {again}")
    for name in found:
        if name not in _KINDS:
            raise ValueError(f"{place}: unknown key {name!r}; there are {', '.join(_KINDS)}")
    for name, (kind, fits) in _KINDS.items():
        if name not in found:
            raise ValueError(f"{place}: {name} is missing; {again}")
        if not fits(found[name]):
            raise ValueError(f"{place}: {name} {json.dumps(found[name])}: {kind} is needed")
    return Tuned(**found)


def with_tuned(config: "DataConfig", device: "torch.device") -> "DataConfig":
    """The settings with those of `--data.tuned` where none are given; given ones stay.

    Raises:
        ValueError: The file cannot be used, or is of another kind of device.
    """
    if not config.tuned:
        return config
    tuned = read_tuned(config.tuned)
    if tuned.device != device.type:
        raise ValueError(
            f"--data.tuned {config.tuned} is of another kind of device: {tuned.device}, and this is {device.type}; "
            f"tune again here (`throughput tune`), or name the device it is for (--device {tuned.device})"
        )
    missing = {name: getattr(tuned, name) for name in SETTINGS if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def foreign(tuned: Tuned, device: "torch.device", processes: int) -> str:
    """In what this machine differs from the one that was tuned, for people; nothing where it does not.

    Args:
        tuned: From the file.
        device: Of this process.
        processes: That share this machine.
    """
    gpu, cores = gpu_model(device), cores_of_a_process(processes)
    differences = [f"on {tuned.gpu or 'a CPU'}, not on {gpu or 'a CPU'}"] if tuned.gpu != gpu else []
    if tuned.cores != cores:
        differences.append(f"with {tuned.cores} cores a process, not {cores}")
    return " and ".join(differences)
