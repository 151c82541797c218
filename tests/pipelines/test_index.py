"""Index files: comparison with DALI's own tool, and damage."""

import concurrent.futures
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import wds2idx

from pipelines.shards.index import Component, count_samples, ensure_index, iter_components, read_index, scan_tar, write_index
from pipelines.shards.shard_set import open_shards


def make_tar(path: Path, names: list[str], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 700 * i
            tar.addfile(member, io.BytesIO(bytes([i]) * member.size))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_equals_dalis_tool(tmp_path: Path, tar_format: int) -> None:
    """Except after the headers of GNU's long names, where DALI's tool is wrong."""
    names = [
        "a/1.jpg",
        "a/1.cls",
        "a/2.cls",
        "a/2.seg.png",
        "a/2.JPG",
        "b/.hidden",
        "b/2.jpg",
        "b/2.cls",
        "3.jpg",
        "./c/d.v2/4.CLS",
    ]
    names += ["größe.jpg", f"{'long/' * 40}2.jpg", f"{'long/' * 40}2.cls"] if tar_format == tarfile.PAX_FORMAT else []
    make_tar(tmp_path / "x.tar", names, tar_format)
    write_index(tmp_path / "ours.idx", scan_tar(tmp_path / "x.tar"))
    with wds2idx.IndexCreator(str(tmp_path / "x.tar"), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "ours.idx").read_text() == (tmp_path / "dali.idx").read_text()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_data(tmp_path: Path, tar_format: int) -> None:
    """Also after the extra headers of long and non-ASCII names."""
    names = ["1.jpg", "1.cls"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += [f"{'long/' * 40}2.jpg", f"{'long/' * 40}2.cls", "größe.jpg", "größe.cls"]
    make_tar(tmp_path / "x.tar", names, tar_format)
    data = (tmp_path / "x.tar").read_bytes()
    components = [component for sample in scan_tar(tmp_path / "x.tar") for component in sample]
    assert [component.name for component in components] == names
    for i, component in enumerate(components):
        assert data[component.offset : component.offset + component.size] == bytes([i]) * (700 * i)


def test_reads_what_it_writes_and_blanks_cannot_break_it(tmp_path: Path) -> None:
    samples = [[Component("jpg", 512, 10, "a b/c d.jpg"), Component("cls", 1536, 1, "a b/c d.cls")]]
    write_index(tmp_path / "x.idx", samples)
    assert count_samples(tmp_path / "x.idx") == 1
    assert read_index(tmp_path / "x.idx") == [
        [Component("jpg", 512, 10, "a_b/c_d.jpg"), Component("cls", 1536, 1, "a_b/c_d.cls")]
    ]


def test_tars_cut_short_and_other_files_are_refused(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", ["1.jpg", "1.cls", "2.jpg", "2.cls"])
    (tmp_path / "short.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.tar: "):
        scan_tar(tmp_path / "short.tar")
    (tmp_path / "text.tar").write_text("this is not a tar")
    with pytest.raises(ValueError, match=r"text\.tar: not a readable tar"):
        scan_tar(tmp_path / "text.tar")
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[1024] ^= 255  # in the name of the second member, so that the checksum of its header is wrong
    (tmp_path / "broken.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.tar: damaged; at byte 1,024 there is neither a member nor an end mark"):
        scan_tar(tmp_path / "broken.tar")


def test_names_in_any_encoding_stay_apart(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name in ("ö.jpg", "ü.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    samples = scan_tar(tmp_path / "x.tar")
    assert [sample[0].name for sample in samples] == ["\\xf6.jpg", "\\xfc.jpg"]
    write_index(tmp_path / "x.idx", samples)
    assert read_index(tmp_path / "x.idx") == samples


def test_memory_does_not_grow_with_the_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(5000):
            tar.addfile(tarfile.TarInfo(f"{i}.jpg"))
    with open(tmp_path / "x.tar", "rb") as file:
        tracemalloc.start()
        assert sum(1 for _ in iter_components(file, "x.tar")) == 5000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 500_000  # keeping five thousand members would take ten times as much


def test_an_index_beside_the_tar_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_tar(tmp_path / "x.tar", ["1.jpg", "1.cls"])
    cached = ensure_index(tmp_path / "x.tar")
    assert cached.is_relative_to(tmp_path / "cache")
    write_index(tmp_path / "x.idx", read_index(cached))
    assert ensure_index(tmp_path / "x.tar") == tmp_path / "x.idx"


def test_threads_may_want_the_same_index_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders of several ranks in one process do this."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars = [tmp_path / f"{i}.tar" for i in range(20)]
    for tar in tars:
        make_tar(tar, ["1.jpg", "1.cls"])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda _: [ensure_index(tar) for tar in tars], range(8)))
    assert all(read_index(index) == scan_tar(tar) for index, tar in zip(paths[0], tars, strict=True))
    assert all(others == paths[0] for others in paths)
    assert sorted((tmp_path / "cache").rglob("*.*")) == sorted(paths[0])


def test_a_folder_of_indices_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_tar(tmp_path / "x.tar", ["1.jpg", "1.cls", "2.jpg", "2.cls"])
    write_index(tmp_path / "x.idx", scan_tar(tmp_path / "x.tar"))
    folder = tmp_path / "indices"
    folder.mkdir()
    assert ensure_index(tmp_path / "x.tar", str(folder)) == tmp_path / "x.idx"
    write_index(folder / "x.idx", scan_tar(tmp_path / "x.tar")[1:])
    assert open_shards(str(tmp_path / "x.tar"), "train", str(folder)).num_samples == 1
    assert open_shards(str(tmp_path / "x.tar"), "train").num_samples == 2


def test_shards_without_samples_are_skipped(tmp_path: Path) -> None:
    for name in ("x", "y"):
        make_tar(tmp_path / f"{name}.tar", ["1.jpg", "1.cls"])
    write_index(tmp_path / "x.idx", [])
    write_index(tmp_path / "y.idx", scan_tar(tmp_path / "y.tar"))
    found = open_shards(str(tmp_path / "{x,y}.tar"), "train")
    assert (found.tars, found.indices, found.num_samples) == ((f"{tmp_path}/y.tar",), (tmp_path / "y.idx",), 1)
