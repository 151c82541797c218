"""What is said about both splits: different classes, the same shards."""

from pathlib import Path

import pytest
import torch

from model.distributed import alone
from pipelines.config import DataConfig
from tools.run.data import open_splits, require_same_classes

MANY = tuple(f"c{number:02d}" for number in range(20))


@pytest.mark.parametrize(
    ("classes", "others", "message"),
    [
        (("ant", "cat"), ("ant", "dog"), "A and B have different classes, 2 and 2; only in A: cat; only in B: dog"),
        (
            MANY,
            ("x",),
            "A and B have different classes, 20 and 1; only in A: c00, c01, c02, c03, c04 and 15 more; only in B: x",
        ),
        (("\x1b[31m",), ("x",), r"A and B have different classes, 1 and 1; only in A: \x1b[31m; only in B: x"),
    ],
)
def test_the_message_says_which_side_has_which(classes: tuple[str, ...], others: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        require_same_classes("A", classes, "B", others)
    assert str(error.value) == message


def test_equal_and_unknown_classes_pass() -> None:
    require_same_classes("A", ("ant",), "B", ["ant"])
    require_same_classes("A", None, "B", ("ant",))
    require_same_classes("A", ("ant",), "B", None)


def test_a_shard_in_both_splits_is_a_warning(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = alone(torch.device("cpu"))
    open_splits(DataConfig(train=str(shards), valid=str(shards)), world)
    assert caplog.messages == []
    open_splits(DataConfig(train=str(shards), valid=str(shards / "*-000001.tar")), world)
    assert caplog.messages == [
        f"{shards}/train-000001.tar is both a training and a validation shard; validation scores what the network has seen"
    ]
