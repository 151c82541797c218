"""Index files: against DALI's own tool, and damaged."""

import io
import tarfile
from pathlib import Path

import pytest
import wds2idx

from pipelines.index import Component, count_samples, ensure_index, read_index, scan_tar, write_index


def make_tar(path: Path, names: list[str], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 700 * i
            tar.addfile(member, io.BytesIO(bytes([i]) * member.size))


def test_equals_dalis_tool(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/1.cls", "a/2.cls", "a/2.seg.png", "a/2.JPG", "b/.hidden", "b/2.jpg", "b/2.cls", "3.jpg"]
    make_tar(tmp_path / "x.tar", names)
    write_index(tmp_path / "ours.idx", scan_tar(tmp_path / "x.tar"))
    with wds2idx.IndexCreator(str(tmp_path / "x.tar"), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "ours.idx").read_text() == (tmp_path / "dali.idx").read_text()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_data(tmp_path: Path, tar_format: int) -> None:
    """Also behind the extra headers of long and non-ASCII names."""
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an index file"),
        ("hello\n", "not an index file; its first line is 'hello"),
        ("v1.2 2\njpg 512 1 a.jpg\n", "2 samples announced, 1 listed"),
        ("v1.2 1\njpg 512 1\n", "not made of four fields"),
    ],
)
def test_damaged_indices_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.idx").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.idx: .*{message}"):
        read_index(tmp_path / "x.idx")


def test_tars_cut_short_and_other_files_are_refused(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", ["1.jpg", "1.cls", "2.jpg", "2.cls"])
    (tmp_path / "short.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.tar: "):
        scan_tar(tmp_path / "short.tar")
    (tmp_path / "text.tar").write_text("this is not a tar")
    with pytest.raises(ValueError, match=r"text\.tar: not a readable tar"):
        scan_tar(tmp_path / "text.tar")


def test_an_index_beside_the_tar_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_tar(tmp_path / "x.tar", ["1.jpg", "1.cls"])
    cached = ensure_index(tmp_path / "x.tar")
    assert cached.is_relative_to(tmp_path / "cache")
    write_index(tmp_path / "x.idx", read_index(cached))
    assert ensure_index(tmp_path / "x.tar") == tmp_path / "x.idx"
