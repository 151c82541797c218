"""`shards index`: index files for tars from other tools, local and in an object store."""

import gzip
import json
import re
import tarfile
from pathlib import Path

import pytest
import wds2idx

from pipelines.remote.object_store import is_url, open_remote
from pipelines.shards.index import group_samples, iter_components, scan_tar
from pipelines.shards.shard_set import open_shards
from tests.tools.test_shards_command import add_member, shards_command
from tools.shards.index import index_shards


def write_tar(path: Path, names: list[str], size: int = 900) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            add_member(tar, name, bytes(size + i))


def dalis_index(tar: Path) -> str:
    path = tar.with_suffix(".dali")
    with wds2idx.IndexCreator(str(tar), str(path), verbose=False) as creator:
        creator.create_index()
    return path.read_text()


def test_index_beside_the_tars(tmp_path: Path) -> None:
    for name in ("x-0.tar", "x-1.tar"):
        write_tar(tmp_path / name, ["a/1.jpg", "a/1.cls", "a/2.cls", "a/2.JPG", f"{name}.jpg"])
    done = shards_command("index", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "index files of 2 tars: 2 written; 6 samples\n"
    for name in ("x-0", "x-1"):
        assert (tmp_path / f"{name}.idx").read_text() == dalis_index(tmp_path / f"{name}.tar")


def test_an_existing_index_is_kept_or_replaced_when_asked(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"x-{i}.tar", ["1.jpg", "1.cls", "2.jpg", "2.cls"])
    good = dalis_index(tmp_path / "x-0.tar")
    partial = "v1.2 1\n" + good.splitlines()[1] + "\n"
    (tmp_path / "x-0.idx").write_text(good)
    (tmp_path / "x-1.idx").write_text(partial)
    done = shards_command("index", tmp_path / "x-*.tar", "--json")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/x-1.idx: differs from the contents of {tmp_path}/x-1.tar")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "x-1.idx").read_text() == partial
    report = json.loads(done.stdout)
    assert report == {
        "written": [f"{tmp_path}/x-2.idx"],
        "replaced": [],
        "kept": [f"{tmp_path}/x-0.idx"],
        "errors": [done.stderr.removeprefix("error: ").rstrip("\n")],
        "notes": [],
        "num_samples": 4,
    }
    done = shards_command("index", tmp_path / "x-*.tar", "--overwrite")
    assert (done.returncode, done.stdout) == (0, "index files of 3 tars: 1 replaced, 2 kept (up to date); 6 samples\n")
    assert (tmp_path / "x-1.idx").read_text() == good


def test_a_damaged_tar_does_not_stop_the_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", ["1.jpg", "1.cls"])
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-0.tar").read_bytes()[:2000])
    write_tar(tmp_path / "x-2.tar", ["1.jpg", "1.cls"])
    done = shards_command("index", tmp_path)
    assert done.returncode == 2
    assert done.stdout == "index files of 3 tars: 2 written; 2 samples\n"
    assert done.stderr.startswith(f"error: {tmp_path}/x-1.tar: cut short; ")
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == ["x-0.idx", "x-2.idx"]


def test_index_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "x.tar", ["1.jpg", "1.cls"])
    report = index_shards(str(tmp_path / "a"), index_dir=tmp_path / "new" / "indices")
    assert report.files("written") == [f"{tmp_path}/new/indices/x.idx"]
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "x.tar"]
    found = open_shards(str(tmp_path / "a"), "train", str(tmp_path / "new" / "indices"))
    assert found.indices == (tmp_path / "new" / "indices" / "x.idx",)


def upload(folder: Path, url: str) -> None:
    import s3fs

    s3fs.S3FileSystem().put([str(path) for path in sorted(folder.iterdir())], url + "/")


def test_remote_tars(tmp_path: Path, s3_bucket: str) -> None:
    for i in range(3):
        write_tar(tmp_path / "tars" / f"x-{i}.tar", ["1.jpg", "1.cls", "größe.jpg", f"{'long/' * 40}2.jpg"])
    upload(tmp_path / "tars", f"{s3_bucket}/index")
    for pattern, count in (("x-{0..1}.tar", 2), ("", 3)):
        indices = tmp_path / f"indices of {count}"
        done = shards_command("index", f"{s3_bucket}/index/{pattern}", "--index-dir", indices)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"index files of {count} tars: {count} written; {3 * count} samples\n"
        assert (indices / "x-1.idx").read_text() == dalis_index(tmp_path / "tars" / "x-1.tar")
    for missing in (f"{s3_bucket}/index/y-*.tar", "s3://no-such-bucket/y.tar"):
        with pytest.raises(ValueError, match=f"no such shard: '{re.escape(missing)}'"):
            index_shards(missing, index_dir=tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "z.tar").write_bytes(gzip.compress((tmp_path / "tars" / "x-0.tar").read_bytes()))
    upload(tmp_path / "packed", f"{s3_bucket}/index")
    [error] = index_shards(f"{s3_bucket}/index/z.tar", index_dir=tmp_path).errors
    assert error == f"{s3_bucket}/index/z.tar: compressed (gzip); copy it, unpack the copy with `gunzip`, and upload that"


def test_remote_tars_are_not_downloaded(tmp_path: Path, s3_bucket: str) -> None:
    write_tar(tmp_path / "tars" / "x.tar", [f"{i}.{extension}" for i in range(5) for extension in ("jpg", "cls")], 500_000)
    upload(tmp_path / "tars", f"{s3_bucket}/large")
    size = (tmp_path / "tars" / "x.tar").stat().st_size
    with open_remote(f"{s3_bucket}/large/x.tar") as file:
        samples = group_samples(iter_components(file, "x.tar"))
        assert 0 < file.raw.requested < size / 20  # type: ignore[attr-defined]
    assert samples == scan_tar(tmp_path / "tars" / "x.tar")


def test_what_is_url() -> None:
    assert [is_url(place) for place in ("s3://bucket/x", "gs://b/x", "/folder/x", "folder", "C://")] == [
        True,
        True,
        False,
        False,
        False,
    ]
