"""The message about different classes of two data sets."""

import pytest

from tools.run.data import require_same_classes

MANY = tuple(f"c{number:02d}" for number in range(20))


@pytest.mark.parametrize(
    ("classes", "others", "message"),
    [
        (("ant", "bee"), ("ant",), "A and B have different classes, 2 and 1; only in A: bee"),
        (("ant",), ("ant", "bee"), "A and B have different classes, 1 and 2; only in B: bee"),
        (("ant", "cat"), ("ant", "dog"), "A and B have different classes, 2 and 2; only in A: cat; only in B: dog"),
        (
            ("ant", "bee", "cat"),
            ("ant", "cat", "bee"),
            "A and B have their classes in another order: class 1 is bee in A, and cat in B",
        ),
        (("Ant", "bee"), ("ant", "bee"), "A and B have classes that differ in capital letters: Ant in A, and ant in B"),
        (("ant", "ant"), ("ant",), "A and B have different classes, 2 and 1; some are listed twice"),
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
