"""Initial weights from a file, for fine-tuning."""

import importlib
import importlib.util
import logging
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.checkpoint import ForeignObjectsError, load_weights_file
from model.config import Arch
from model.factory import tensor_names
from model.fit import is_dense, listed, load_tensors, misfit, misfits
from model.foreign import find_weights
from model.input_scale import needs_transform_input
from model.load_model import GOOGLENET, WeightsChoice, choose_weights, describe, empty_network, require_arch, weights_of

log = logging.getLogger("train")

AUXILIARY = ("aux1", "aux2")
# Keeps the tensors of a file, in their dicts. The user runs it, because loading the file runs code from it.
EXTRACT = (
    "import sys, torch; T, M = torch.Tensor, torch.nn.Module; "
    "keep = lambda x: x if isinstance(x, T) else {k: keep(v) for k, v in (x.state_dict() if isinstance(x, M) else x).items() "
    "if isinstance(v, (T, M, dict))}; "
    "torch.save(keep(torch.load(sys.argv[1], 'cpu', weights_only=False)), sys.argv[2])"
)


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights: those of a checkpoint, or a state dict as torchvision and other programs save it.

    Attributes:
        path: The file.
        state: State dict.
        classes: Class names by number, if they are known.
        transform_input: Whether the weights need a renormalized input, see `GoogLeNet`; `None` if the file does not tell.
        why: The reason, for the log.
        which: Which weights of the file these are, for the log.
        is_partial: Whether tensors that do not fit are skipped instead of refused.
    """

    path: Path
    state: dict[str, Tensor]
    classes: tuple[str, ...] | None
    transform_input: bool | None
    why: str
    which: str
    is_partial: bool

    def choose_transform_input(self, setting: bool | None) -> bool:
        """Returns whether the network renormalizes its input, and logs the reason.

        Args:
            setting: --model.transform-input, which decides if it is given.
        """
        if setting is not None:
            log.info("transform_input: %s, as --model.transform-input says", "on" if setting else "off")
        elif self.transform_input is None:
            log.warning("transform_input: off; %s; --model.transform-input True turns it on", self.why)
        else:
            word, other = ("on", False) if self.transform_input else ("off", True)
            log.info("transform_input: %s, %s; --model.transform-input %s overrides it", word, self.why, other)
        return bool(self.transform_input if setting is None else setting)

    def __call__(self, model: nn.Module, classes: tuple[str, ...] | None, layers: Sequence[str]) -> None:
        """Loads the weights into a model.

        If the classes differ in number or name, the last layers keep their random weights. Auxiliary heads that only one side
        has are ignored.

        Args:
            model: The network.
            classes: Names of its classes, if they are known.
            layers: Names of its last layers.

        Raises:
            ValueError: Other tensors do not match, and `is_partial` is not set.
        """
        wanted = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        are_renamed = self.classes is not None and classes is not None and self.classes != classes
        others = {
            layer: (shapes[f"{layer}.weight"][0], wanted[f"{layer}.weight"].shape[0])
            for layer in layers
            if _are_for_classes(shapes, wanted, layer)
            and (are_renamed or shapes[f"{layer}.weight"] != tuple(wanted[f"{layer}.weight"].shape))
        }
        # Files from before torch 0.4.1 lack these counters of batches, and torch loads such files.
        counters = {name for name in wanted if name.endswith(".num_batches_tracked") and name not in shapes}
        one_sided = {head for head in AUXILIARY if _has(shapes, head) != _has(wanted, head)}
        ignored = counters | {f"{layer}.{kind}" for layer in others for kind in ("weight", "bias")}
        ignored |= {name for name in {*wanted, *shapes} if name.split(".")[0] in one_sided}
        offered, needed = ({name: side[name] for name in side if name not in ignored} for side in (self.state, wanted))
        taken = self._fitting(offered, needed)
        load_tensors(model, taken)
        log.info("loaded %d of %d tensors from %s%s", len(taken), len(wanted), self.path, self.which)
        if problems := misfits(offered, needed):
            log.warning("not loaded from %s: %s", self.path, listed(problems))
        for before, now in {*others.values()}:
            why = f"the file has {before} classes, and the data {now}" if before != now else "the classes have other names"
            log.info("%s: the last layers are reset: %s", why, ", ".join(others))
        if missing := [head for head in AUXILIARY if head in one_sided and _has(wanted, head)]:
            log.info("the file lacks auxiliary heads; they are reset: %s", ", ".join(missing))

    def _fitting(self, offered: dict[str, Tensor], needed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors that fit.

        Raises:
            ValueError: Some do not, and `is_partial` is not set, or none fits.
        """
        common = offered.keys() & needed.keys()
        if 2 * len(common) < len(offered) and not self.is_partial:
            example = ascii(next(name for name in offered if name not in needed))
            raise ValueError(
                f"--init-from {self.path}: its tensors are those of another network: of {len(offered)} names, this one has "
                f"{len(common)}, and not {example}; --model.arch trains another network"
            )
        problems = misfits(offered, needed)
        if problems and not self.is_partial:
            raise ValueError(f"--init-from {self.path} does not fit: {listed(problems)}; --init-from-partial loads what fits")
        taken = {name: offered[name] for name in needed if name in common and not misfit(offered[name], needed[name])}
        if not taken:
            raise ValueError(f"--init-from {self.path}: nothing in it fits the network")
        if broken := next((name for name, value in taken.items() if not value.float().isfinite().all()), None):
            raise ValueError(f"--init-from {self.path}: {broken} has values that are infinite or not a number")
        return taken


def _are_for_classes(shapes: dict[str, tuple[int, ...]], wanted: dict[str, Tensor], layer: str) -> bool:
    """Returns whether both sides have this linear layer with the same input size."""
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    if not {weight, bias} <= {*shapes} & {*wanted} or len(shapes[weight]) != 2:
        return False
    classes, width = shapes[weight]
    return width == wanted[weight].shape[1] and shapes[bias] == (classes,)


def _has(names: Iterable[str], head: str) -> bool:
    return any(name.startswith(f"{head}.") for name in names)


def read_initial_weights(
    path: Path | None, *, is_partial: bool = False, weights: WeightsChoice = "auto", arch: Arch = GOOGLENET
) -> InitialWeights | None:
    """Reads the file of `--init-from`, if any.

    Args:
        path: The file.
        is_partial: Whether tensors that do not fit are skipped instead of refused.
        weights: Which weights of a checkpoint of train.py to take; "auto" for those that scored better in its validation.
        arch: The network that they are for.

    Raises:
        ValueError: The file holds no weights, or `weights` names some and train.py has not written it.
    """
    if path is None:
        return None
    if path.is_dir():
        raise ValueError(f"--init-from {path}: a folder; name a file, such as {path / 'best.pt'}")
    if not path.is_file():
        raise ValueError(f"--init-from {path}: no such file")
    content = _read(path)
    if "ema" in content and "architecture" in content:
        described = describe(path, content)
        require_arch(path, described, arch, "--model.arch")
        chosen, why = choose_weights(weights, described)
        return InitialWeights(
            path,
            weights_of(path, content, empty_network(described), chosen),
            described.classes,
            described.transform_input,
            "as in the checkpoint",
            f", weights: {chosen} ({why})",
            is_partial,
        )
    if weights != "auto":
        raise ValueError(f"--init-from-weights {weights}: {path} is not a checkpoint of train.py; leave the option out")
    return _of_other_programs(path, content, arch, is_partial=is_partial)


def _of_other_programs(path: Path, content: dict[str, Any], arch: Arch, *, is_partial: bool) -> InitialWeights:
    """Finds the weights in a file that train.py has not written.

    Raises:
        ValueError: It holds none.
    """
    found = find_weights(content, tensor_names(arch))
    if found is None:
        keys = ascii(", ".join(map(str, [*content][:5])))[1:-1]
        raise ValueError(
            f"--init-from {path}: neither a checkpoint of train.py nor a state dict of tensors; it holds {keys or 'nothing'}"
        )
    which = [
        *([f"its {found.place!r}"] if found.place else []),
        *([f"without the prefix {found.prefix!a}"] if found.prefix else []),
        *([f"not taken: {ascii(', '.join((*found.others, *found.left)[:5]))[1:-1]}"] if found.others or found.left else []),
    ]
    dense = {name: tensor for name, tensor in found.state.items() if is_dense(tensor)}
    needed = needs_transform_input(dense)
    why = {
        True: "because the statistics of its first layer are those of inputs with a deviation of 0.5",
        False: "because the statistics of its first layer are those of inputs with ImageNet's deviation",
        None: "the file does not tell whether its weights need it, as torchvision's published ones do",
    }
    return InitialWeights(path, found.state, None, needed, why[needed], "".join(f", {part}" for part in which), is_partial)


def _read(path: Path) -> dict[str, Any]:
    """Reads a file of torch or of safetensors.

    Raises:
        ValueError: It is neither, it is damaged, or it contains more than tensors and plain values.
    """
    try:
        return _read_safetensors(path) if _is_safetensors(path) else load_weights_file(path)
    except ForeignObjectsError as error:
        raise ValueError(
            f"--init-from {error}. Loading that runs code from the file. If you trust it, extract its tensors where it was "
            f'made, and name the new file: python -c "{EXTRACT}" {shlex.quote(str(path))} weights.pth'
        ) from error
    except ValueError as error:
        raise ValueError(f"--init-from {error}") from error
    except OSError as error:
        raise ValueError(f"--init-from {path}: cannot be read ({error.strerror})") from error


def _is_safetensors(path: Path) -> bool:
    """Returns whether a file begins like the format does: the length of a JSON object in 8 bytes, and the object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _read_safetensors(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError(f"{path} is a file of safetensors, and safetensors is not installed; pip install safetensors")
    try:
        content: dict[str, Any] = importlib.import_module("safetensors.torch").load_file(path)
    except OSError:
        raise
    except Exception as error:  # its own exception class
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    return content
