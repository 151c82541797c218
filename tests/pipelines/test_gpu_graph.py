"""The GPU's graph without a driver.

Without a GPU a graph can be made and serialized, but not built. What is serialized is what DALI's backend would build from, so
it is checked against the operators and schemas that the backend has.
"""

import dataclasses
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import pytest
import torch
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from nvidia.dali import backend, fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipelines import augment
from pipelines.config import DataConfig
from pipelines.dali.draws import draws_from_outside
from pipelines.dali.graph import DTYPES, ENCODED, Stage, decoding_pipeline, has_conditionals, image_pipeline
from pipelines.loader import MEAN, STD
from tests.pipelines.test_augment import EVERY

OPTIONS: dict[str, Any] = {"device_id": None, "batch_size": 4, "num_threads": 2}
REGISTERED = {
    "cpu": frozenset(backend.RegisteredCPUOps()),
    "gpu": frozenset(backend.RegisteredGPUOps()),
    "mixed": frozenset(backend.RegisteredMixedOps()),
}
# DALI gives these to every operator itself, and schemas do not list them.
GIVEN_BY_DALI = {"device", "preserve_name"}


class Tensor(NamedTuple):
    """What one operator gives, and another one or the pipeline's user takes."""

    name: str
    device: str
    argument: str | None = None  # the name of the argument, where it is no ordinary input


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of a serialized graph."""

    name: str  # of its schema
    device: str  # cpu, gpu or mixed
    constants: dict[str, bool | None]  # the arguments that are the same for all samples; values of those that are yes or no
    inputs: tuple[Tensor, ...]
    arguments: tuple[Tensor, ...]  # those that differ from sample to sample
    outputs: tuple[Tensor, ...]


class Graph(NamedTuple):
    operators: list[Operator]
    outputs: list[Tensor]


def fields(message: bytes) -> dict[int, list[Any]]:
    """The values of a protobuf message by the numbers of its fields; DALI installs no description of its messages."""
    values = defaultdict[int, list[Any]](list)
    for field in UnknownFieldSet(Empty.FromString(message)):
        values[field.field_number].append(field.data)
    return values


# The numbers of the fields in these three are from DALI's `dali/pipeline/proto/dali.proto`.
def parse_tensor(message: bytes) -> Tensor:
    values = fields(message)
    return Tensor(values[1][0].decode(), values[2][0].decode(), values[4][0].decode() if values[4] else None)


def parse_operator(message: bytes) -> Operator:
    values = fields(message)
    constants = {argument[1][0].decode(): argument for argument in map(fields, values[4])}
    taken = list(map(parse_tensor, values[2]))
    return Operator(
        name=values[1][0].decode(),
        device=constants["device"][5][0].decode(),
        constants={name: bool(argument[6][0]) if argument[6] else None for name, argument in constants.items()},
        inputs=tuple(tensor for tensor in taken if tensor.argument is None),
        arguments=tuple(tensor for tensor in taken if tensor.argument is not None),
        outputs=tuple(map(parse_tensor, values[3])),
    )


def parse_graph(message: bytes) -> Graph:
    values = fields(message)
    assert values[5]
    return Graph(list(map(parse_operator, values[5])), list(map(parse_tensor, values[7])))


def misfits(operator: Operator) -> list[str]:
    """Where an operator is not one that the backend has."""
    schema = backend.GetSchema(operator.name, follow_aliases=True)
    found = []
    if operator.name not in REGISTERED[operator.device]:
        found.append(f"is not registered for {operator.device}")
    if not schema.MinNumInput() <= len(operator.inputs) <= schema.MaxNumInput():
        found.append(f"takes {schema.MinNumInput()} to {schema.MaxNumInput()} inputs, not {len(operator.inputs)}")
    for index, tensor in enumerate(operator.inputs[: schema.MaxNumInput()]):
        needed = schema.GetInputDevice(index, tensor.device, operator.device).replace("mixed", "cpu")
        if tensor.device != needed:
            found.append(f"needs input {index} on {needed}, not on {tensor.device}")
    for name in sorted(operator.constants.keys() - GIVEN_BY_DALI):
        if not schema.HasArgument(name):
            found.append(f"has no argument {name}")
    for tensor in operator.arguments:
        if not (schema.HasArgument(tensor.argument) and schema.IsTensorArgument(tensor.argument)):
            found.append(f"takes no tensor as {tensor.argument}")
        if tensor.device != "cpu":
            found.append(f"needs {tensor.argument} on cpu, not on {tensor.device}")
    return found


def problems(graph: Graph) -> list[str]:
    """Which operators the backend lacks, and where images are on the CPU that belong on the GPU.

    Single numbers may go from the CPU to the GPU, as some do in DALI's automatic augmentations.
    """
    found = [f"{operator.name} {what}" for operator in graph.operators for what in misfits(operator)]
    made_on = {tensor.name: tensor.device for operator in graph.operators for tensor in operator.outputs}
    for operator in graph.operators:
        if operator.name.startswith("decoders__") and operator.device != "mixed":
            found.append(f"{operator.name} decodes on {operator.device}")
        for tensor in operator.inputs + operator.arguments:
            if tensor.device == "cpu" and made_on[tensor.name] == "gpu":
                found.append(f"{operator.name} has the CPU wait for the GPU")
    return found


def graph_of(make: Callable[[], Pipeline]) -> Graph:
    """The graph as DALI serializes it, which it does not with a Python function in it.

    Deprecated names are found by their warnings, as a graph keeps nothing of the old name of an argument. DALI's automatic
    augmentations use some themselves, and `pipelines/augment.py` hides those warnings.
    """
    with warnings.catch_warnings(record=True) as caught, draws_from_outside() as draws:
        pipeline = make()
        message = pipeline.serialize()
    draws.check(pipeline)
    assert not [str(warning.message) for warning in caught]
    return parse_graph(message)


def image_graph(
    train: bool, dtype: torch.dtype = torch.float16, until: Stage = "normalize", device: str = "gpu", **settings: Any
) -> Graph:
    """The graph of a loader, made as `ImagePipeline` makes it."""
    config = DataConfig(**settings)
    return graph_of(
        lambda: image_pipeline(
            enable_conditionals=has_conditionals(train, config),
            train=train,
            device=device,
            image_size=224,
            dtype=dtype,
            config=config,
            until=until,
            **OPTIONS,
        )
    )


def prediction_graph() -> Graph:
    options: dict[str, Any] = {"device": "gpu", "image_size": 224, "resize_shorter": 256, "mean": MEAN, "std": STD}
    return graph_of(lambda: decoding_pipeline(**options, **OPTIONS))


GRAPHS: dict[str, Callable[[], Graph]] = {
    f"{'train' if train else 'valid'}-{str(dtype).removeprefix('torch.')}-{until}": partial(image_graph, train, dtype, until)
    for train, dtype, until in itertools.product((True, False), DTYPES, get_args(augment.Stage))
}
GRAPHS |= {f"train-{step.name}": partial(image_graph, True, augment=(step,)) for step in EVERY}
GRAPHS |= {
    "train-no-augmentation": partial(image_graph, True, augment=()),
    "train-every-augmentation": partial(image_graph, True, augment=EVERY),
    "train-two-flips": partial(image_graph, True, augment=(augment.HorizontalFlip(), augment.HorizontalFlip())),
    "train-other-crops": partial(image_graph, True, crop=augment.RandomResizedCrop((0.35, 1.0), (1.0, 2.0))),
    "predict": prediction_graph,
}


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_the_backend_has_every_operator_and_the_images_end_on_the_gpu(make: Callable[[], Graph]) -> None:
    graph = make()
    assert problems(graph) == []
    assert [tensor.device for tensor in graph.outputs] == ["gpu"]


@pytest.mark.parametrize("train", [True, False])
def test_headers_are_read_on_the_cpu_alone(train: bool) -> None:
    graph = image_graph(train, until="headers")
    assert problems(graph) == []
    assert {operator.device for operator in graph.operators} == {"cpu"}


@pytest.mark.parametrize("settings", [{}, {"hw_decoder_load": 0.5}])
@pytest.mark.parametrize("train", [True, False])
def test_the_decoder_is_given_its_load(train: bool, settings: dict[str, Any]) -> None:
    graph = image_graph(train, **settings)
    assert problems(graph) == []
    assert set(settings) == decoder(graph).constants.keys() & {"hw_decoder_load"}


@pytest.mark.parametrize(("train", "is_interpolated"), [(True, False), (False, True)])
def test_chroma_is_interpolated_in_whole_images_only(train: bool, is_interpolated: bool) -> None:
    """NvImageCodec decodes a part of a JPEG on the CPU if chroma is to be interpolated and nvJPEG is older than 13.2."""
    assert ("RandomCrop" in decoder(image_graph(train)).name) == train
    assert decoder(image_graph(train)).constants["jpeg_fancy_upsampling"] == is_interpolated


def decoder(graph: Graph) -> Operator:
    [decoder] = [operator for operator in graph.operators if operator.device == "mixed"]
    return decoder


def control(images: Callable[[DataNode], DataNode]) -> Graph:
    """A graph of what `images` makes of encoded images."""
    define = pipeline_def(lambda: images(fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1)))
    return graph_of(lambda: define(exec_dynamic=True, **OPTIONS))


def decoded(encoded: DataNode) -> DataNode:
    return fn.decoders.image(encoded, device="mixed")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (lambda encoded: fn.peek_image_shape(decoded(encoded)), "PeekImageShape is not registered for gpu"),
        (lambda encoded: fn.flip(decoded(encoded).cpu()), "Flip has the CPU wait for the GPU"),
        (lambda encoded: fn.decoders.image(encoded).gpu(), "decoders__Image decodes on cpu"),
    ],
    ids=["unregistered", "back-to-cpu", "decoded-on-cpu"],
)
def test_graphs_with_a_problem_are_caught(images: Callable[[DataNode], DataNode], expected: str) -> None:
    """DALI makes and serializes each of them."""
    assert problems(control(images)) == [expected]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"inputs": ()}, "takes 1 to 1 inputs, not 0"),
        ({"inputs": (Tensor("a", "gpu"), Tensor("b", "gpu"))}, "takes 1 to 1 inputs, not 2"),
        ({"inputs": (Tensor("a", "cpu"),)}, "needs input 0 on gpu, not on cpu"),
        ({"constants": {"antialiasing": True}}, "has no argument antialiasing"),
        ({"arguments": (Tensor("a", "cpu", "sizes"),)}, "takes no tensor as sizes"),
        ({"arguments": (Tensor("a", "cpu", "antialias"),)}, "takes no tensor as antialias"),
        ({"arguments": (Tensor("a", "gpu", "size"),)}, "needs size on cpu, not on gpu"),
    ],
)
def test_operators_with_a_problem_are_caught(change: dict[str, Any], expected: str) -> None:
    """DALI refuses such ones before there is a graph, so one of the real graph is changed."""
    [resize] = [operator for operator in image_graph(True).operators if operator.name == "Resize"]
    assert misfits(resize) == []
    assert misfits(dataclasses.replace(resize, **change)) == [expected]


@pytest.mark.parametrize(
    "images",
    [
        lambda encoded: fn.experimental.equalize(decoded(encoded)),
        lambda encoded: fn.resize(decoded(encoded), size=[8, 8], image_type=types.RGB),
    ],
    ids=["operator", "argument"],
)
def test_deprecated_names_are_caught(images: Callable[[DataNode], DataNode]) -> None:
    with pytest.raises(AssertionError, match=r"deprecated|no longer used"):
        control(images)


def test_python_functions_are_caught() -> None:
    """The CPU's graph has some. On a GPU each batch would wait for Python."""
    with pytest.raises(RuntimeError, match=r"Could not serialize the operator: `nvidia\.dali\.fn\.dl_tensor_python_function`"):
        image_graph(True, device="cpu")
