"""JSON of other programs and of damaged files: each is read, or refused in one line that names the file and the key."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines import json_file
from pipelines.bad_samples.quarantine import read_quarantine
from pipelines.shards.shard_set import open_shards
from tests.helpers.command import Done, run_main
from tools.shards.cli import main as shards_main

NOT_JSON = {
    "empty": (b"", "empty"),
    "blank": (b" \n\t", "empty"),
    "cut": (b'{"a": 1', "not valid JSON (Expecting ',' delimiter"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "not UTF-8 text, from byte 7 on"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 text, from byte 0 on"),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "infinite": (b'{"a": Infinity}', "Infinity is no number in JSON"),
    "minus": (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
    "NaN": (b'{"a": NaN}', "NaN is no number in JSON"),
    "1e999": (b'{"a": 1e999}', "the number 1e999 is out of range"),
    "long": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits is out of range"),
    "zeros": (bytes(1000), "not valid JSON"),
    "a tar": (b"x-0.tar" + bytes(505), "not valid JSON"),
}
NOT_OBJECTS = [[1, 2], "train", 7, None, True]


@pytest.fixture
def folder(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x").mkdir()
    for path in shards.glob("valid-000000.*"):
        shutil.copy(path, tmp_path / "x")
    return tmp_path / "x"


def one_line(done: Done, *parts: object, status: int = 2) -> None:
    assert (done.status, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    for part in parts:
        assert str(part) in done.stderr


@pytest.mark.parametrize("kind", NOT_JSON)
def test_what_is_not_json(folder: Path, kind: str) -> None:
    content, message = NOT_JSON[kind]
    (folder / "_info.json").write_bytes(content)
    one_line(run_main(shards_main, "info", folder), f"{folder}/_info.json: ", message)
    done = run_main(shards_main, "verify", folder, "--check", "none", "--workers", 1, "--json")
    [finding] = json.loads(done.stdout)["findings"]
    assert (done.status, finding["kind"], message in finding["detail"]) == (3, "wrong-info", True)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        *((value, "an object is needed, not ") for value in NOT_OBJECTS),
        ({"splits": ["train"]}, "'splits' must be an object, not ['train']"),
        ({"splits": {"valid": {}}}, "split 'valid': 'filenames' is missing"),
        ({"splits": {"valid": {"filenames": None}}}, "split 'valid': 'filenames' is missing"),
        ({"splits": {"valid": {"filenames": []}}}, "split 'valid': 'filenames' is empty"),
        ({"splits": {"valid": ["valid-000000.tar"]}}, "split 'valid': an object is needed"),
        (
            {"splits": {"valid": {"filenames": "valid-000000.tar"}}},
            "'filenames' must be a list of texts, not 'valid-000000.tar'",
        ),
        ({"splits": {"valid": {"filenames": [0]}}}, "'filenames' must be a list of texts, not [0]"),
        *(
            ({"splits": {"valid": {"filenames": [name]}}}, "which is not the name of a file beside _info.json")
            for name in ("/etc/x.tar", "../x.tar", "a/x.tar", "..", "", "x\0.tar")
        ),
        (
            {"splits": {"valid": {"filenames": [], "shard_lengths": [-1]}}},
            "'shard_lengths' must be a list of whole numbers from 0",
        ),
        ({"splits": {"valid": {"filenames": [], "shard_lengths": ["1"]}}}, "'shard_lengths' must be a list of whole numbers"),
        (
            {"splits": {"valid": {"filenames": [], "shard_bytes": 7}}},
            "'shard_bytes' must be a list of whole numbers from 0, not 7",
        ),
        ({"splits": {"valid": {"filenames": [], "num_samples": 1.5}}}, "'num_samples' must be a whole number from 0, not 1.5"),
        ({"splits": {"valid": {"filenames": [], "conversion": [1]}}}, "'conversion' must be an object"),
        ({"splits": {"valid": {"filenames": [], "conversion": {"source": 1}}}}, "'source' must be an object, not 1"),
        ({"splits": {"\x1b[2J": 1}}, r"split '\\x1b[2J'"),
        ({"classes": 7}, "'classes' must be a list of texts, not 7"),
        ({"classes": "cat,dog"}, "'classes' must be a list of texts, not 'cat,dog'"),
        ({"classes": [0, 1]}, "'classes' must be a list of texts, not [0, 1]"),
        ({"classes": {"0": "cat"}}, "'classes' must be a list of texts"),
    ],
)
def test_an_info_with_other_types(folder: Path, info: Any, message: str) -> None:
    (folder / "_info.json").write_text(json.dumps(info))
    for pattern in (folder, folder / "valid-*.tar"):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            open_shards(str(pattern), "valid")
        assert str(error.value).startswith(f"{folder}/_info.json: ")
        assert message.replace("\\\\", "\\") in str(error.value).replace("\\\\", "\\")
    for verb in ("info", "index", "verify"):
        done = run_main(shards_main, verb, folder, "--workers", 1)
        assert done.status in (0, 2, 3)
    one_line(run_main(shards_main, "info", folder), f"{folder}/_info.json: ")


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"splits": None, "classes": None},
        {"splits": {}, "classes": []},
        {"version": 2, "shards": [{"basename": "shard.00000.mds", "column_names": ["image"]}]},
        {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "valid-000000.tar", "nsamples": 10}]},
        {"splits": {"valid": {"filenames": ["valid-000000.tar"], "shard_lengths": None, "num_samples": None}}},
        {
            "splits": {"valid": {"filenames": ["valid-000000.tar"], "dataset": "x", "alt": [1]}},
            "name": "x",
            "more": {"a": [1.5]},
        },
    ],
)
def test_the_info_of_other_tools(folder: Path, info: dict[str, Any]) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (folder / "_info.json").write_text(json.dumps(info), encoding=encoding)
        found = open_shards(str(folder), "valid")
        assert (found.num_samples, found.classes) == (10, None)
    for verb in ("info", "verify"):
        assert run_main(shards_main, verb, folder, "--workers", 1).status in (0, 3)


def test_a_huge_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / "_info.json", "wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr(json_file, "MOST_BYTES", 2**20)
    one_line(run_main(shards_main, "info", folder), f"{folder}/_info.json: larger than 1 MiB")


GOOD = {"tar": "/x.tar", "offset": 512, "member": "1.jpg", "reason": "bad"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((content.replace(b"\n", b" "), message) for content, message in NOT_JSON.values() if content.endswith(b"}")),
        *((json.dumps(value).encode() + b" ", "an object is needed, not ") for value in NOT_OBJECTS),
        (json.dumps({**GOOD, "offset": "512"}).encode(), "'offset' must be a whole number from 0, not '512'"),
        (json.dumps({**GOOD, "offset": -1}).encode(), "'offset' must be a whole number from 0, not -1"),
        (json.dumps({**GOOD, "member": ["x"]}).encode(), "'member' must be a text, not ['x']"),
        (json.dumps({"tar": "x"}).encode(), "'member' is missing"),
    ],
)
def test_a_quarantine_with_other_lines(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "quarantine.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_quarantine(file)
    assert str(error.value).startswith(f"{file}, line 3: ")
    assert message in str(error.value)


def test_a_quarantine_of_killed_runs(tmp_path: Path) -> None:
    """Incomplete lines are skipped, and unknown keys are accepted."""
    torn = json.dumps(GOOD).encode()[:-9]
    more = json.dumps({**GOOD, "found": "epoch 1", "reason": None}).encode()
    (tmp_path / "quarantine.jsonl").write_bytes(b"\xef\xbb\xbf" + torn + b"\n" + more + b"\r\n" + torn)
    [sample] = read_quarantine(tmp_path)
    assert (sample.offset, sample.reason) == (512, "")


@pytest.mark.parametrize(
    "content", [b"000.jpg" + bytes(2000), b"ant\nbee\n", b'{\n  "splits": {\n    "train": {}\n  }\n}', b"\xff\xd8\n"]
)
def test_what_is_no_quarantine(tmp_path: Path, content: bytes) -> None:
    """A tar, a list of classes, other JSON, an image: a line that was not written completely begins like a complete one."""
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file}, line [12]: not "):
        read_quarantine(file)


def test_zeros_where_a_machine_has_lost_the_end_of_a_file(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    (tmp_path / "x").write_bytes(line + b"\n" + bytes(100) + b"\n" + line + b"\n" + line[:9] + bytes(50))
    assert len(read_quarantine(tmp_path / "x")) == 2


def test_a_folder_without_a_quarantine(tmp_path: Path) -> None:
    """A run without bad samples has no such file. Any other folder is a mistake."""
    with pytest.raises(ValueError, match=f"^{tmp_path}: neither the folder of a run nor a folder with a quarantine.jsonl; "):
        read_quarantine(tmp_path)
    (tmp_path / "config.json").touch()
    assert read_quarantine(tmp_path) == []


@pytest.fixture
def begun(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[object]]:
    """A conversion whose last step fails, and its command."""
    command: list[object] = ["convert", image_folder, tmp_path / "out", "--shard-samples", 10, "--workers", 1]
    with monkeypatch.context() as patch:
        patch.setattr("tools.shards.convert.publish", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert run_main(shards_main, *command).status == 1
    return tmp_path / "out", command


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{}", b'{"record": {}, "classes": "ab", "table": ""}', NOT_JSON["deep list"][0]]
)
def test_a_damaged_plan_of_a_conversion(begun: tuple[Path, list[object]], content: bytes) -> None:
    folder, command = begun
    (folder / ".train.convert" / "plan.json").write_bytes(content)
    one_line(
        run_main(shards_main, *command), f"{folder}/.train.convert/plan.json: ", "; --overwrite starts the conversion over"
    )
    assert run_main(shards_main, *command, "--overwrite").status == 0


@pytest.mark.parametrize("content", [b"", b"7", b"{", b'{"name": "train-000001.tar", "num_samples": "x"}', b"\xff"])
def test_a_shard_with_a_damaged_report_is_built_again(begun: tuple[Path, list[object]], content: bytes) -> None:
    folder, command = begun
    before = (folder / "train-000001.tar").read_bytes()
    (folder / ".train.convert" / "000001.json").write_bytes(content)
    assert run_main(shards_main, *command).status == 0
    assert (folder / "train-000001.tar").read_bytes() == before
    assert json.loads((folder / "_info.json").read_text())["splits"]["train"]["num_samples"] == 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_bytes": None}, "'shard_bytes' is missing"),
        ({"shard_bytes": [1]}, "3 'filenames' and 1 'shard_bytes'"),
        ({"changes": []}, "'changes' must be an object of whole numbers from 0, not []"),
        ({"image_bytes": -1}, "'image_bytes' must be a whole number from 0, not -1"),
    ],
)
def test_a_complete_conversion_with_a_damaged_info(
    begun: tuple[Path, list[object]], changes: dict[str, Any], message: str
) -> None:
    folder, command = begun
    assert run_main(shards_main, *command).status == 0
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"] |= changes
    (folder / "_info.json").write_text(json.dumps(info))
    one_line(run_main(shards_main, *command), f"{folder}/_info.json: split 'train': ", message, "; --overwrite converts")
    assert run_main(shards_main, *command, "--overwrite").status == 0


@pytest.mark.parametrize("line", [b"[]", b'{"split": "train"}', b'{"split": "train", "path": 7, "reason": ""}', b"\xff{}"])
def test_a_damaged_list_of_rejected_images(begun: tuple[Path, list[object]], line: bytes) -> None:
    folder, command = begun
    (folder / "rejected.jsonl").write_bytes(line + b"\n")
    one_line(run_main(shards_main, *command), f"{folder}/rejected.jsonl, line 1: ")
