"""Ctrl-C in the loop of a command ends its workers at once."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.shards import demo, index, info, verify


class Interrupted:
    """A progress bar during which the user presses Ctrl-C, after the first result."""

    def __init__(self, results: Iterable[object] = (), *_: object, **__: object) -> None:
        self._results = results

    def __iter__(self) -> Iterator[object]:
        yield next(iter(self._results))
        raise KeyboardInterrupt

    def __enter__(self) -> "Interrupted":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix_str(self, *_: object, **__: object) -> None:
        raise KeyboardInterrupt

    update = set_postfix_str


@pytest.mark.parametrize(
    ("module", "work"),
    [
        (verify, lambda shards, _: verify.verify(str(shards), level="none")),
        (info, lambda shards, _: info.collect(str(shards))),
        (index, lambda shards, folder: index.index_shards(str(shards), index_dir=folder)),
        (demo, lambda _, folder: list(demo.make_demo(folder / "demo", 20, 20, 0, False))),
    ],
)
def test_workers_end(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, work: Callable[[Path, Path], object]
) -> None:
    ended = []

    def run(function: Callable[[Any], object], tasks: Iterable[Any], _: int) -> Iterator[object]:
        try:
            yield from map(function, tasks)
        finally:
            ended.append(True)

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt) as error:  # its traceback keeps the generator alive
        work(shards, tmp_path)
    assert ended == [True]
    del error
