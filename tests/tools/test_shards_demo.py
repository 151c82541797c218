"""Finding the shards of a path, a glob or a brace pattern."""

import json
from pathlib import Path

import pytest

from pipelines.shards.shard_set import open_shards


@pytest.mark.parametrize(
    "pattern",
    ["{0}", "{0}/train-*.tar", "{0}/train-{{000000..000003}}.tar", "{0}/train-00000{{0,1}}.tar", "{0}/train-000002.tar"],
)
def test_notations(shards: Path, pattern: str) -> None:
    found = open_shards(pattern.format(shards), "train")
    names = [Path(tar).name for tar in found.tars]
    assert names == sorted(names)
    assert all(name.startswith("train-") for name in names)
    assert found.classes == ("ant", "bee", "cat")
    assert found.num_samples == sum(min(16, 61 - 16 * int(name[6:12])) for name in names)
    assert len(found.labels()) == found.num_samples


def test_a_folder_gives_the_split_of_that_name(shards: Path) -> None:
    assert open_shards(str(shards), "train").num_samples == 61
    assert open_shards(str(shards), "valid").num_samples == 25


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0}/nothing-*.tar", r"no such shard: '.*nothing-\*\.tar'"),
        ("{0}/train-{{000002..000007}}.tar", r"no such shard: '.*train-000004\.tar' \(part of '.*\{{000002\.\.000007\}}"),
        ("{0}/train-{{0..3.tar", "the braces do not match"),
        ("{0}/train-{{000001,*}}.tar", r"names \S+train-000001\.tar more than once"),
        ("{1}", r"no \.tar files in folder"),
    ],
)
def test_missing_shards_are_named(shards: Path, tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(shards)):
        open_shards(pattern.format(shards, tmp_path), "train")


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    """Even if there is only one split, training data is not silently used for validation."""
    splits = {name: {"filenames": [f"{name}-000000.tar"]} for name in ("all", "test")}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(ValueError, match=r"has the splits all, test, but none called 'valid'; name the shards"):
        open_shards(str(tmp_path), "valid")


def test_info_that_lists_missing_shards_or_is_broken(tmp_path: Path) -> None:
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": ["gone.tar"]}}}))
    with pytest.raises(ValueError, match=r"_info\.json lists shards that are not there: gone\.tar"):
        open_shards(str(tmp_path), "train")
    (tmp_path / "_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"_info\.json: not valid JSON"):
        open_shards(str(tmp_path), "train")
