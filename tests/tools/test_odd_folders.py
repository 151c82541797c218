"""Folders as they are: of systems and tools, with links in a circle, strange files and names, and without images."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import write_image
from tests.helpers.command import Done, run_main
from tools.shards.cli import main
from tools.shards.sources.listing import is_system_name


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "1.jpg"
    write_image(path, 1, (16, 16))
    return path.read_bytes()


@pytest.fixture
def source(tmp_path: Path, image: bytes) -> Path:
    """The classes ant and bee with two images each."""
    for name in ("ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/deep/2.jpg"):
        put(tmp_path / "src" / name, image)
    return tmp_path / "src"


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def convert(source: Path, *options: object) -> Done:
    return run_main(main, "convert", source, source.parent / "out", "--workers", 1, *options)


def result(source: Path) -> tuple[int, list[str], dict[str, str]]:
    """Returns the number of samples, the classes, and the reasons of the files that were left out."""
    out = source.parent / "out"
    info = json.loads((out / "_info.json").read_text())
    lines = (out / "rejected.jsonl").read_text().splitlines() if (out / "rejected.jsonl").exists() else []
    rejected = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    return info["splits"]["train"]["num_samples"], info["classes"], rejected


SYSTEM = (
    *("@eaDir", "#recycle", "@Recycle", "lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"),
    *(".ipynb_checkpoints", ".Trash-1000", ".git", "__pycache__"),
)


@pytest.mark.parametrize("labelled", [False, True])
def test_what_systems_add_is_neither_a_class_nor_a_sample(source: Path, image: bytes, labelled: bool) -> None:
    for name in SYSTEM:
        for below in ("", "ant/", "bee/deep/"):
            put(source / below / name / "1.jpg" / "SYNOPHOTO_THUMB_M.jpg", image)
            put(source / below / name / "cat" / "t.jpg", image)
    for name in ("Thumbs.db", "desktop.ini", "._1.jpg", ".DS_Store", "ehthumbs.db"):
        put(source / "ant" / name, image)
        put(source / name, image)
    options: list[object] = []
    if labelled:
        (source.parent / "list.csv").write_text("ant/1;ant\nant/2;ant\nbee/1;bee\nbee/deep/2;bee\n")
        options = ["--labels", source.parent / "list.csv"]
    done = convert(source, *options)
    assert done.status == 0, done.stderr
    assert result(source) == (4, ["ant", "bee"], {})
    assert "warning" not in done.stdout


@pytest.mark.parametrize("name", ["train", "recycled", "eaDir", "lost", "MACOSX", "thumbs", "a.b"])
def test_names_of_classes_are_not_those_of_systems(name: str) -> None:
    assert not is_system_name(name)


def test_a_folder_without_an_image_is_no_class(source: Path, image: bytes) -> None:
    (source / "aaa_empty").mkdir()
    put(source / "notes" / "readme.txt", b"hello")
    put(source / "web" / "1.jpg", b"<html>not found</html>")
    put(source / "zero" / "1.jpg", b"")
    put(source / "cat" / "no_extension", image)
    done = convert(source)
    assert done.status == 0, done.stderr
    assert "warning: skipped 4 class folders without images: aaa_empty, notes, web, zero\n" in done.stdout
    rejected = {"notes/readme.txt": "not an image", "web/1.jpg": "not an image", "zero/1.jpg": "empty file"}
    assert result(source) == (5, ["ant", "bee", "cat"], rejected)


def test_a_class_whose_images_are_all_damaged_keeps_its_number_with_a_warning(source: Path, image: bytes) -> None:
    put(source / "asp" / "1.jpg", image[: len(image) // 2])
    for _ in range(2):  # also if there is nothing left to do
        done = convert(source)
        assert "warning: no image is left of 1 class, which keeps its number: asp\n" in done.stdout
    assert result(source)[:2] == (4, ["ant", "asp", "bee"])


@pytest.mark.parametrize("check", ["decode", "structure"])
def test_a_jpeg_that_is_cut_short_and_padded_is_left_out(source: Path, image: bytes, check: str) -> None:
    """As in training, which looks for the end mark. The decoder accepts such a file."""
    put(source / "ant" / "3.jpg", image[:-2] + bytes(64))
    assert convert(source, "--check", check).status == 0
    assert result(source) == (4, ["ant", "bee"], {"ant/3.jpg": "jpeg image cut short"})


@pytest.mark.parametrize("format", ["gif", "bmp", "png", "webp", "tiff", "jp2", "ppm", "tga", "ico", "avif", "pcx"])
def test_every_format_makes_a_class(tmp_path: Path, format: str) -> None:
    write_image(tmp_path / "src" / "ant" / f"1.{format}", 1, (16, 16))
    assert "train: 1 image of 1 class in" in convert(tmp_path / "src").stdout


LOOP = "a link to a folder that contains it"


@pytest.mark.parametrize(
    ("link", "target", "loops"),
    [
        ("bee/up", "..", ["bee/up"]),
        ("bee/self", ".", ["bee/self"]),
        ("bee/deep/up", "../..", ["bee/deep/up"]),
        ("bee/above", "../..", ["bee/above"]),
        ("loop", ".", ["loop"]),
        ("bee/root", "/", ["bee/root"]),
        ("bee/other", "../ant", []),
    ],
)
def test_links_in_a_circle_are_left_out(source: Path, link: str, target: str, loops: list[str]) -> None:
    (source / link).symlink_to(target)
    done = convert(source)
    assert done.status == 0, done.stderr
    assert result(source)[1:] == (["ant", "bee"], dict.fromkeys(loops, LOOP))
    assert result(source)[0] == (4 if loops else 6)


def test_links_that_lead_to_each_other_end(source: Path) -> None:
    (source / "ant" / "x").symlink_to("../bee")
    (source / "bee" / "y").symlink_to("../ant")
    done = convert(source)
    assert done.status == 0, done.stderr
    assert result(source) == (8, ["ant", "bee"], {"ant/x/y": LOOP, "bee/y/x": LOOP})


def test_the_source_itself_may_be_a_link(source: Path) -> None:
    (source.parent / "link").symlink_to(source)
    assert "train: 4 images of 2 classes" in convert(source.parent / "link").stdout


def test_strange_files_are_left_out(source: Path, image: bytes) -> None:
    os.mkfifo(source / "ant" / "pipe.jpg")
    (source / "ant" / "gone.jpg").symlink_to("nowhere.jpg")
    (source / "ant" / "circle.jpg").symlink_to("circle.jpg")
    (source / "ring").symlink_to("ring")
    put(source / "ant" / "line\nbreak \x1b[31m.jpg", image)
    put(Path(os.fsdecode(bytes(source) + b"/caf\xe9/\xff.jpg")), image)
    here = os.getcwd()
    os.chdir(source / "ant")  # a socket's path is limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    os.chdir(here)
    done = convert(source)
    assert done.status == 0, done.stderr
    count, classes, rejected = result(source)
    assert (count, classes) == (6, ["ant", "bee", "caf\udce9"])
    assert rejected == {
        "ant/circle.jpg": "cannot be read (Too many levels of symbolic links)",
        "ant/gone.jpg": "broken symbolic link",
        "ant/pipe.jpg": "not a regular file",
        "ant/socket.jpg": "not a regular file",
    }
    assert "\x1b" not in done.stdout


def put_deep(folder: Path, names: list[str], image: bytes) -> None:
    here = os.getcwd()
    os.chdir(folder)
    for name in names:
        os.mkdir(name)
        os.chdir(name)
    Path("1.jpg").write_bytes(image)
    os.chdir(here)


def test_paths_longer_than_the_system_allows(source: Path, image: bytes) -> None:
    put_deep(source / "ant", ["d" * 200] * 30, image)  # the limit is 4096 bytes
    done = convert(source)
    assert done.status == 0, done.stderr
    count, _, rejected = result(source)
    assert count == 4
    assert list(rejected.values()) == ["cannot be read (File name too long)"]


def test_many_folders_within_each_other(source: Path, image: bytes) -> None:
    put_deep(source / "ant", ["d"] * 1200, image)
    done = convert(source)
    subprocess.run(["rm", "-r", source / "ant" / "d"], check=True)  # pytest would delete it by recursion
    assert "train: 5 images of 2 classes" in done.stdout


def fails_for(function: Callable[..., object], name: str, error: OSError) -> Callable[..., object]:
    """Returns a function that raises an error for a path that ends in `name`: chmod does not stop the superuser."""

    def replacement(path: object, *rest: object, **options: object) -> object:
        if str(path).endswith(name):
            raise error
        return function(path, *rest, **options)

    return replacement


def test_unreadable_files_and_folders_are_left_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "scandir", fails_for(os.scandir, "bee/deep", denied))
    monkeypatch.setattr(os, "open", fails_for(os.open, "ant/2.jpg", denied))
    done = convert(source)
    assert done.status == 0, done.stderr
    reasons = {"bee/deep": "folder cannot be read (Permission denied)", "ant/2.jpg": "cannot be read (Permission denied)"}
    assert result(source) == (2, ["ant", "bee"], reasons)


def test_an_unreadable_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "scandir", fails_for(os.scandir, "src", PermissionError(13, "Permission denied")))
    done = convert(source)
    assert (done.status, done.stderr) == (2, f"error: {source}: cannot be read (Permission denied)\n")


def test_a_failure_of_the_storage_is_not_an_unreadable_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images in it must not be missing in silence."""
    monkeypatch.setattr(os, "scandir", fails_for(os.scandir, "bee/deep", OSError(5, "Input/output error", "bee/deep")))
    done = convert(source)
    assert (done.status, done.stderr) == (1, "error: bee/deep: Input/output error\n")


def test_one_folder_around_the_classes_is_noticed(source: Path) -> None:
    done = convert(source.rename(source.parent / "images").rename(source.parent / "images").parent / "images")
    assert "the only class is" not in done.stdout
    wrapped = source.parent / "wrapped"
    wrapped.mkdir()
    (source.parent / "images").rename(wrapped / "images")
    done = convert(wrapped, "--overwrite")
    assert f"warning: the only class is images; if the classes are the folders in it, convert {wrapped}/images" in done.stdout
