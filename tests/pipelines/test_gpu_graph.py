"""Checks the graph for a GPU without a driver.

Without a GPU a graph can be defined and serialized, but not built. DALI's backend would build from the serialized form, which
is checked here against the operators and schemas of the backend.
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

from pipelines.augment import HorizontalFlip, RandomResizedCrop
from pipelines.config import DataConfig
from pipelines.dali import operators
from pipelines.dali.cpu_resize import CenterCropResize, Resize
from pipelines.dali.draws import draws_from_outside
from pipelines.dali.graph import DTYPES, ENCODED, Stage, has_conditionals, image_pipeline
from pipelines.dali.operators import Preprocessing
from pipelines.spec import LoaderSpec
from tests.pipelines.test_augment import EVERY

OPTIONS: dict[str, Any] = {"device_id": None, "batch_size": 4, "num_threads": 2}
REGISTERED = {
    "cpu": frozenset(backend.RegisteredCPUOps()),
    "gpu": frozenset(backend.RegisteredGPUOps()),
    "mixed": frozenset(backend.RegisteredMixedOps()),
}
# DALI sets these for every operator, and schemas do not list them.
GIVEN_BY_DALI = {"device", "preserve_name"}


class Tensor(NamedTuple):
    """An output of an operator, which another operator or the user of the pipeline takes."""

    name: str
    device: str
    argument: str | None = None  # name of the argument, unless it is an ordinary input


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of a serialized graph."""

    name: str  # name of its schema
    device: str  # cpu, gpu or mixed
    constants: dict[str, bool | None]  # arguments common to all samples, and the values of the Boolean ones
    inputs: tuple[Tensor, ...]
    arguments: tuple[Tensor, ...]  # arguments that differ between samples
    outputs: tuple[Tensor, ...]


class Graph(NamedTuple):
    operators: list[Operator]
    outputs: list[Tensor]


def fields(message: bytes) -> dict[int, list[Any]]:
    """Returns the values of a protobuf message by field number. DALI installs no description of its messages."""
    values = defaultdict[int, list[Any]](list)
    for field in UnknownFieldSet(Empty.FromString(message)):
        values[field.field_number].append(field.data)
    return values


# The field numbers in these three functions are from DALI's `dali/pipeline/proto/dali.proto`.
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
    """Lists how an operator differs from the backend's."""
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
    """Lists operators that the backend lacks, and images that are on the CPU instead of the GPU.

    Single numbers may move from the CPU to the GPU, as in DALI's automatic augmentations.
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
    """Returns the graph as DALI serializes it. DALI cannot serialize a Python function.

    Warnings reveal deprecated names, because a graph does not keep the old name of an argument. DALI's automatic augmentations
    use some themselves, and `pipelines/augment.py` hides those warnings.
    """
    with warnings.catch_warnings(record=True) as caught, draws_from_outside() as draws:
        pipeline = make()
        message = pipeline.serialize()
    draws.check(pipeline)
    assert not [str(warning.message) for warning in caught]
    return parse_graph(message)


def image_graph(
    train: bool,
    dtype: torch.dtype = torch.float16,
    until: Stage = "normalize",
    resize: Resize | None = None,
    **settings: Any,
) -> Graph:
    """Returns the graph of a loader, as `ImagePipeline` defines it."""
    config = DataConfig(**settings)
    split = "train" if train else "valid"
    spec = LoaderSpec(split=split, batch_size=4, image_size=224, device=torch.device("cuda"), dtype=dtype)  # type: ignore[arg-type]
    options = OPTIONS | {"enable_conditionals": has_conditionals(config, spec)}
    return graph_of(lambda: image_pipeline(config, spec, Preprocessing(), resize, until, **options))


GRAPHS: dict[str, Callable[[], Graph]] = {
    f"{'train' if train else 'valid'}-{str(dtype).removeprefix('torch.')}-{until}": partial(image_graph, train, dtype, until)
    for train, dtype, until in itertools.product((True, False), DTYPES, get_args(operators.Stage))
}
GRAPHS |= {f"train-{step.name}": partial(image_graph, True, augment=(step,)) for step in EVERY}
GRAPHS |= {
    "train-no-augmentation": partial(image_graph, True, augment=()),
    "train-every-augmentation": partial(image_graph, True, augment=EVERY),
    "train-two-flips": partial(image_graph, True, augment=(HorizontalFlip(), HorizontalFlip())),
    "train-other-crops": partial(image_graph, True, crop=RandomResizedCrop((0.35, 1.0), (1.0, 2.0))),
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
    """With interpolated chroma and nvJPEG before 13.2, nvImageCodec would decode parts of JPEGs on the CPU."""
    assert ("RandomCrop" in decoder(image_graph(train)).name) == train
    assert decoder(image_graph(train)).constants["jpeg_fancy_upsampling"] == is_interpolated


def decoder(graph: Graph) -> Operator:
    [decoder] = [operator for operator in graph.operators if operator.device == "mixed"]
    return decoder


def control(images: Callable[[DataNode], DataNode]) -> Graph:
    """Returns a graph that applies `images` to encoded images."""
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
    """DALI itself accepts and serializes each of them."""
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
    """DALI rejects such operators before there is a graph, so the test alters one of a valid graph."""
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
    """The graph for a CPU has some. On a GPU each batch would wait for Python."""
    with pytest.raises(RuntimeError, match=r"Could not serialize the operator: `nvidia\.dali\.fn\.dl_tensor_python_function`"):
        image_graph(False, resize=CenterCropResize(size=224, resize_shorter=256))
