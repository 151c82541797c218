"""Builds the network that the settings name: GoogLeNet, or what a factory of another package or file returns.

Importing a package runs its code. So a factory is imported only if the user names it, and never because a checkpoint does.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.config import NORM_MOMENTUM, SHORT_EPOCH, Arch, ModelConfig, choose_norm_momentum
from model.googlenet import GoogLeNet

LAST_LAYERS = ("fc", "aux1.fc2", "aux2.fc2")  # of GoogLeNet


def build_network(
    config: ModelConfig, num_classes: int, transform_input: bool, steps_per_epoch: int = SHORT_EPOCH
) -> nn.Module:
    """Builds a network with random weights on the CPU.

    If the settings of another network than GoogLeNet leave the momentum of its running statistics open, layers with torch's
    default get one for the steps of an epoch, and layers with another momentum keep it.

    Args:
        config: Which network, and its settings.
        num_classes: Length of the logits.
        transform_input: Whether GoogLeNet renormalizes its input.
        steps_per_epoch: Optimizer steps per epoch.

    Raises:
        ValueError: The factory cannot be imported or called, or returns something else than a module.
    """
    network: nn.Module
    if config.arch:
        network = build_other(config.named, num_classes)
    else:
        network = GoogLeNet(num_classes, config.aux_logits, transform_input, config.dropout)
    chosen = choose_norm_momentum(steps_per_epoch) if config.arch else NORM_MOMENTUM
    for module in network.modules():
        if isinstance(module, _BatchNorm) and (config.norm_momentum or module.momentum == NORM_MOMENTUM):
            module.momentum = config.norm_momentum or chosen
    return network


def describe_statistics(network: nn.Module) -> str:
    """Describes the running statistics of a network's batch normalization, for the log."""
    found = {module.momentum for module in network.modules() if isinstance(module, _BatchNorm)}
    numbers = [f"{momentum:.3g}" for momentum in sorted(each for each in found if each is not None)]
    parts = [*numbers, *(["1 / batches"] if None in found else [])]  # None: torch averages over all batches
    return f"running statistics with momentum {', '.join(parts)}" if parts else "no running statistics"


def build_other(arch: Arch, num_classes: int) -> nn.Module:
    """Calls the factory of a network that is not GoogLeNet; otherwise as `build_network`."""
    factory = find_factory(arch.factory)
    options = {name: _value(text) for name, _, text in (option.partition("=") for option in arch.options)}
    try:
        network = factory(num_classes=num_classes, **options)
    except Exception as error:  # anything: this is the code of others
        raise ValueError(f"{arch}: the factory failed: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{arch}: the factory returned a {type(network).__name__} instead of a torch.nn.Module")
    return network


def tensor_names(arch: Arch) -> Collection[str]:
    """Returns the names in a network's state dict."""
    if arch.factory:
        return build_other(arch, num_classes=2).state_dict().keys()
    with torch.device("meta"):
        return GoogLeNet().state_dict().keys()


def last_layers(network: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the linear layers that give logits."""
    if isinstance(network, GoogLeNet):
        return LAST_LAYERS
    layers = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return tuple(name for name, module in layers if module.out_features == num_classes)


def check_network(network: nn.Module, arch: Arch, num_classes: int, image_size: int) -> None:
    """Runs a network on one black image, on the device of its parameters, before a run that would fail at its first step.

    Raises:
        ValueError: The network fails, or its output is not `(1, num_classes)`.
    """
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise ValueError(f"--model.arch {arch}: the network has no parameters to train")
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, 3, image_size, image_size, device=parameter.device))
    except Exception as error:  # anything: this is the code of others
        raise ValueError(
            f"--model.arch {arch}: the network fails on an image of {image_size} pixels (--image-size): {one_line(error)}"
        ) from error
    finally:
        network.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        found = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"--model.arch {arch}: in evaluation the network gives {found} for one image instead of (1, {num_classes})"
        )


def find_factory(name: str) -> Callable[..., Any]:
    """Imports a factory.

    Raises:
        ValueError: It does not exist, or its import fails.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # anything: this is the code of others
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{place}.".startswith(f"{missing}."):
            way_out = "install it, or name a file: FILE.py:FACTORY"
            raise ValueError(f"{name}: there is no package {missing}; {way_out}") from None
        raise ValueError(f"{name}: {place} cannot be imported: {one_line(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, [each for each in dir(module) if callable(getattr(module, each))], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}: {place} has no function {attribute}{hint}")
    return factory


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _value(text: str) -> Any:
    """Returns the value of a Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def one_line(error: Exception) -> str:
    """Returns an error of other code as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
