"""`shards verify`: what it finds, what it accepts, and training on the samples that its quarantine leaves."""

import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.shards.index import read_index, scan_tar, write_index
from pipelines.shards.shard_set import ShardSet, open_shards
from tests.conftest import write_image
from tests.tools.test_shards_command import add_member, shards_command
from tools.shards.verify import LINES_PER_KIND, Report, verify
from tools.shards.verify_tar import Finding

Member = tuple[str, bytes]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "x.jpg"
    write_image(path, 1, quality=90)
    return path.read_bytes()


def write_tar(path: Path, members: Iterable[Member], index: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add_member(tar, name, data)
    if index:
        write_index(path.with_suffix(".idx"), scan_tar(path))
    return path


def good(image: bytes, *keys: str) -> list[Member]:
    return [member for key in keys for member in ((f"{key}.jpg", image), (f"{key}.cls", b"1"))]


def write_info(folder: Path, lengths: dict[str, int], **changes: object) -> None:
    split = {
        "name": "train",
        "num_samples": sum(lengths.values()),
        "filenames": list(lengths),
        "shard_lengths": [*lengths.values()],
    }
    (folder / "_info.json").write_text(
        json.dumps({"splits": {"train": {**split, **changes}}, "classes": ["ant", "bee", "cat"]})
    )


def found(report: Report) -> list[tuple[str, str, str]]:
    return [(finding.kind, Path(finding.tar).name, finding.member) for finding in report.findings]


def targets(shards: ShardSet) -> list[int]:
    """Returns the labels from the validation loader."""
    device = torch.device("cpu")
    with build_loader(
        DataConfig(), LoaderSpec(split="valid", batch_size=4, image_size=32, device=device), shards=shards
    ) as loader:
        return [int(label) for batch in loader for label in batch["target"]]


def test_what_convert_writes_is_clean(shards: Path) -> None:
    done = shards_command("verify", shards)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "7 tars, 86 samples: no findings\n"


def test_everything_is_found(tmp_path: Path, image: bytes) -> None:
    tars = {
        "a.tar": [
            *good(image, "1", "2"),
            *(("3.jpg", image[: len(image) // 2]), ("3.cls", b"0")),
            *(("4.jpg", image), ("4.cls", b"cow")),
            *(("5.jpg", image), ("5.cls", b" 3\n")),
            *(("6.txt", b""), ("6.cls", b"0")),
            ("7.JPEG", image),
            *(("8.jpg", image), ("8.jpg", image), ("8.cls", b"0")),
            *good(image, "1"),
        ],
        "b.tar": good(image, "2", "b"),
        "c.tar": good(image, "c 1", "c2"),
        "cut.tar": good(image, "d1", "d2", "d3"),
        "e.tar": good(image, "e1", "e2"),
        "text.tar": [],
    }
    for name, members in tars.items():
        write_tar(tmp_path / name, members, index=name not in ("b.tar", "c.tar"))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[: 2 * (len(image) // 512 + 4) * 512 + 700])
    (tmp_path / "text.tar").write_text("this is not a tar")
    (tmp_path / "e.idx").write_text((tmp_path / "e.idx").read_text().replace(f" {len(image)} ", f" {len(image) - 1} ", 1))
    write_info(tmp_path, {**dict.fromkeys(tars, 2), "a.tar": 9, "e.tar": 3, "gone.tar": 5}, num_samples=7)

    done = shards_command("verify", tmp_path, "--json")
    assert (done.returncode, done.stderr) == (3, "")
    report = json.loads(done.stdout)
    place = {component.name: component.offset for sample in scan_tar(tmp_path / "a.tar") for component in sample}
    listed = [(finding["kind"], Path(finding["tar"]).name, finding["member"]) for finding in report["findings"]]
    assert listed == [
        ("wrong-info", "_info.json", ""),
        ("missing-tar", "gone.tar", ""),
        ("bad-image", "a.tar", "3.jpg"),
        ("bad-label", "a.tar", "4.cls"),
        ("bad-label", "a.tar", "5.cls"),
        ("missing-image", "a.tar", "6.txt"),
        ("missing-label", "a.tar", "7.JPEG"),
        ("repeated-member", "a.tar", "8.jpg"),
        ("duplicate-key", "a.tar", "1.jpg"),
        ("duplicate-key", "b.tar", "2.jpg"),
        ("blank-in-key", "c.tar", "c 1.jpg"),
        ("damaged-tar", "cut.tar", ""),
        ("wrong-index", "e.tar", ""),
        ("wrong-info", "e.tar", ""),
        ("damaged-tar", "text.tar", ""),
    ]
    details = {finding["member"]: finding for finding in report["findings"]}
    assert details["3.jpg"] == {
        "kind": "bad-image",
        "tar": f"{tmp_path}/a.tar",
        "offset": place["3.jpg"],
        "member": "3.jpg",
        "detail": "jpeg image cut short",
    }
    assert "'cow', which is none of the 3 classes" in details["4.cls"]["detail"]
    assert "class 3 is out of range; there are 3 classes" in details["5.cls"]["detail"]
    assert report["counts"]["bad-label"] == 2
    assert (report["num_tars"], report["num_left_out"]) == (6, 0)
    assert any("2 tars have no index file" in note for note in report["notes"])

    table = shards_command("verify", tmp_path)
    assert table.returncode == 3
    lines = table.stdout.splitlines()
    assert lines[0] == f"6 tars, {report['num_samples']} samples: 15 findings"
    assert ["bad-label", "2"] in [line.split() for line in lines]
    assert f"{tmp_path}/a.tar:{place['3.jpg']}:3.jpg  bad-image  jpeg image cut short" in lines


@pytest.mark.parametrize("with_index_dir", [False, True])
def test_training_goes_on_without_the_quarantined(tmp_path: Path, image: bytes, with_index_dir: bool) -> None:
    folder = tmp_path / "shards"
    bad_image, bad_label = [("3.jpg", image[: len(image) // 2]), ("3.cls", b"2")], [("4.jpg", image), ("4.cls", b"dog")]
    write_tar(folder / "x-0.tar", good(image, "1", "2") + bad_image + bad_label + good(image, "5"))
    write_tar(folder / "x-1.tar", [("6.jpg", b"text"), ("6.cls", b"0")], index=False)
    write_tar(folder / "x-2.tar", [("7.jpg", image), ("7.cls", b"0"), ("8.jpg", image), ("8.cls", b"2")])
    write_info(folder, {"x-0.tar": 5, "x-1.tar": 1, "x-2.tar": 2})
    with pytest.raises(ValueError, match=r"dog|data pipeline stopped"):
        targets(open_shards(str(folder), "train"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    indices = tmp_path / "indices"
    options = ["--index-dir", indices] if with_index_dir else []
    done = shards_command("verify", folder, "--quarantine", *options)
    assert done.returncode == 3
    assert "note: wrote 2 index files, which leave out 3 bad samples" in done.stdout
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = {name for name in after if after[name] != before.get(name)}
    assert written == (set() if with_index_dir else {"x-0.idx", "x-1.idx"})
    again = shards_command("verify", folder, *options)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == (
        "3 tars, 5 samples: no findings\nnote: 3 samples are left out by the index files, and were not checked\n"
    )
    usable = open_shards(str(folder), "train", str(indices) if with_index_dir else "")
    assert usable.num_samples == 5
    assert targets(usable) == [1, 1, 1, 0, 2]
    device = torch.device("cpu")
    with build_loader(
        DataConfig(), LoaderSpec(split="train", batch_size=5, image_size=32, device=device), shards=usable
    ) as loader:
        for _ in range(3):
            assert sorted(label for batch in loader for label in batch["target"].tolist()) == [0, 1, 1, 1, 2]


def test_of_a_damaged_tar_the_whole_samples_are_kept(tmp_path: Path, image: bytes) -> None:
    tar = write_tar(tmp_path / "x.tar", good(image, "1", "2", "3"))
    third = scan_tar(tar)[2]
    for size, kept in ((third[0].offset + 100, 2), (third[1].offset - 512, 2), (third[1].offset + 512, 3)):
        short = tmp_path / f"short-{size}.tar"
        short.write_bytes(tar.read_bytes()[:size])
        shutil.copy(tar.with_suffix(".idx"), short.with_suffix(".idx"))
        report = verify(str(short), quarantine=True, num_workers=1)
        assert found(report) == [("damaged-tar", short.name, "")]
        assert f"{short} stays damaged: its index lists only the {kept} good samples before the damage" in report.notes
        assert read_index(short.with_suffix(".idx")) == scan_tar(tar)[:kept]
        assert targets(open_shards(str(short), "train")) == [1] * kept
        assert found(verify(str(short), num_workers=1)) == [("damaged-tar", short.name, "")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("v1.2 3", "v1.2 4"), "4 samples announced, 3 listed"),
        (
            lambda text: text.replace("jpg 512", "jpg 513"),
            "1 of its 3 samples differ from the tar, the first at",
        ),
        (lambda text: text.replace("cls", "txt"), "3 of its 3 samples differ from the tar"),
        (lambda text: "v1.2 2\n" + text.splitlines()[1] + "\n" + text.splitlines()[1] + "\n", "1 of its 2 samples"),
        (lambda text: "v1.2 1\n" + " ".join(text.splitlines()[1:]) + "\n", "1 of its 1 samples"),
        (lambda text: "\x00\xff", "not an index file"),
    ],
)
def test_wrong_indices(tmp_path: Path, image: bytes, change: Any, message: str) -> None:
    tar = write_tar(tmp_path / "x.tar", good(image, "1", "2", "3"))
    text = tar.with_suffix(".idx").read_text()
    tar.with_suffix(".idx").write_text(change(text))
    [finding] = verify(str(tar), level="none", num_workers=1).findings
    assert finding.kind == "wrong-index"
    assert message in finding.detail
    verify(str(tar), level="none", num_workers=1, quarantine=True)
    assert tar.with_suffix(".idx").read_text() == text


def test_an_index_that_leaves_samples_out_is_fine(tmp_path: Path, image: bytes) -> None:
    members = [*good(image, "1"), ("2.jpg", b"text"), ("2.cls", b"none"), *good(image, "3 x")]
    tar = write_tar(tmp_path / "x.tar", members)
    write_index(tar.with_suffix(".idx"), scan_tar(tar)[::2])  # `write_index` replaces blanks
    report = verify(str(tmp_path), num_workers=1)
    assert (report.findings, report.num_samples, report.num_left_out) == ((), 2, 1)


def test_blanks_in_keys_are_mended_by_an_index(tmp_path: Path, image: bytes) -> None:
    tar = write_tar(tmp_path / "x.tar", good(image, "1 a", "2"), index=False)
    assert found(verify(str(tar), num_workers=1, quarantine=True)) == [("blank-in-key", "x.tar", "1 a.jpg")]
    assert found(verify(str(tar), num_workers=1)) == []
    assert targets(open_shards(str(tar), "train")) == [1, 1]


def test_keys_that_restart_in_each_tar_are_not_quarantined(tmp_path: Path, image: bytes) -> None:
    for i in range(3):
        write_tar(tmp_path / f"x-{i}.tar", good(image, "1", "2"))
    report = verify(str(tmp_path), num_workers=1, quarantine=True)
    assert report.counts == {"duplicate-key": 4}
    assert report.quarantine == ()
    assert any("nothing was quarantined: 4 of 6 keys are repeated" in note for note in report.notes)


def test_levels_differ_in_what_they_promise(tmp_path: Path, image: bytes) -> None:
    write_image(tmp_path / "x.png", 1)
    damaged = bytearray((tmp_path / "x.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    members = [("1.jpg", image[: len(image) // 2]), ("1.cls", b"0"), ("2.png", damaged), ("2.cls", b"0"), *good(image, "3")]
    tar = write_tar(tmp_path / "x.tar", members)
    names = {}
    for level in ("decode", "structure", "none"):
        done = shards_command("verify", tar, "--check", level, "--json")
        report = json.loads(done.stdout)
        names[level] = [finding["member"] for finding in report["findings"]]
        assert done.returncode == (3 if names[level] else 0)
        assert len(report["notes"]) == (level != "decode")
    assert names == {"decode": ["1.jpg", "2.png"], "structure": ["1.jpg"], "none": []}


def test_a_long_list_is_cut_and_says_so() -> None:
    findings = tuple(Finding("bad-label", "x.tar", i, f"{i}.cls", "the label") for i in range(LINES_PER_KIND + 7))
    text = str(Report(1, 100, 0, findings, (), 0, ()))
    assert text.count("the label") == LINES_PER_KIND
    assert text.splitlines()[-1] == "... and 7 more bad-label; --json lists all"


def test_a_broken_info_is_a_finding(tmp_path: Path, image: bytes) -> None:
    write_tar(tmp_path / "train-0.tar", good(image, "1"))
    write_tar(tmp_path / "valid-0.tar", good(image, "1"))  # another split by its name, so the key may occur again
    (tmp_path / "_info.json").write_text("{")
    assert found(verify(str(tmp_path), num_workers=1)) == [("wrong-info", "_info.json", "")]
