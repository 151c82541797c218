"""Lists of images and classes: every usual separator, header, encoding and form of path, and no class by mistake."""

import json
import os
import tarfile
import threading
from pathlib import Path

import pytest

from tests.conftest import write_image
from tests.helpers.command import Done, run_main
from tools.shards.cli import main

FOUR = ("00.jpg", "01.jpg", "02.jpg", "03.jpg")
CLASSES = ("cat", "dog", "cat", "dog")
PAIRS = tuple(zip(FOUR, CLASSES, strict=True))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "1.jpg"
    write_image(path, 1, (16, 16))
    return path.read_bytes()


def convert(tmp: Path, image: bytes, names: tuple[str, ...], text: str | bytes, file: str = "list.csv") -> Done:
    """Converts images of these names, each with its name after its end mark, and a list."""
    for name in names:
        (tmp / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / "images" / name).write_bytes(image + name.encode())
    (tmp / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return run_main(main, "convert", tmp / "images", tmp / "out", "--labels", tmp / file, "--check", "none", "--workers", 1)


def stored(tmp: Path, image: bytes) -> dict[str, str]:
    """Returns the class of each image by its name."""
    classes = json.loads((tmp / "out" / "_info.json").read_text())["classes"]
    with tarfile.open(tmp / "out" / "train-000000.tar") as tar:
        contents = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    return {data[len(image) :].decode(): classes[int(label)] for data, label in zip(contents[::2], contents[1::2], strict=True)}


def lines(separator: str, end: str = "\n", header: str = "") -> str:
    return header + "".join(f"{name}{separator}{label}{end}" for name, label in PAIRS)


@pytest.mark.parametrize("file", ["list.csv", "list.txt"])
@pytest.mark.parametrize("separator", [";", "; ", " ; ", "|", "\t", ",", ", ", " ", "   "])
def test_separators_are_recognized(tmp_path: Path, image: bytes, separator: str, file: str) -> None:
    done = convert(tmp_path, image, FOUR, lines(separator), file)
    assert done.status == 0, done.stderr
    assert stored(tmp_path, image) == dict(PAIRS)


ROWS = {
    "stems": ("00;cat\n01;dog\n02;cat\n03;dog\n", PAIRS),
    "Windows": (lines(";", "\r\n", "path;class\r\n"), PAIRS),
    "old Mac": (lines(";", "\r"), PAIRS),
    "Excel's Unicode text": (lines("\t", "\r\n", "path\tclass\r\n").encode("utf-16"), PAIRS),
    "byte order mark": (lines(";").encode("utf-8-sig"), PAIRS),
    "sep line": ("sep=;\n" + lines(";", header="path;class\n"), PAIRS),
    "any sep": ("sep=:\n" + lines(":"), PAIRS),
    "lines of an empty table": ("00.jpg;cat\n;\n01.jpg;dog\n;\n", PAIRS[:2]),
    "decimal commas": ("file;label;score\n00.jpg;cat;0,5\n01.jpg;dog;0,25\n", PAIRS[:2]),
    "number before": ("id,filename,label\n1,00.jpg,cat\n2,01.jpg,dog\n", PAIRS[:2]),
    "class before": ("cat,00.jpg\ndog,01.jpg\n", PAIRS[:2]),
    "empty last column": ("00.jpg;cat;\n01.jpg;dog;\n", PAIRS[:2]),
    "comments": ("# my list\n00.jpg;cat\n# the rest\n01.jpg;dog\n", PAIRS[:2]),
    "class with blanks, semicolon": ("00.jpg;polar bear\n01.jpg;cat\n", (("00.jpg", "polar bear"), ("01.jpg", "cat"))),
    "class with blanks, comma": ("00.jpg,polar bear\n01.jpg,cat\n", (("00.jpg", "polar bear"), ("01.jpg", "cat"))),
    "class with comma": ("00.jpg\ttench, Tinca\n01.jpg\tcat, Felis\n", (("00.jpg", "tench, Tinca"), ("01.jpg", "cat, Felis"))),
    "quoted": ('"00.jpg","a, b"\n01.jpg,"5"" disk"\n', (("00.jpg", "a, b"), ("01.jpg", '5" disk'))),
    "one class a line": ("cat\npolar bear\ncat\ndog\n", tuple(zip(FOUR, ("cat", "polar bear", "cat", "dog"), strict=True))),
    "header above classes": ("label\ncat\ndog\ncat\ndog\n", PAIRS),
}


@pytest.mark.parametrize("case", ROWS)
def test_forms_of_lists(tmp_path: Path, image: bytes, case: str) -> None:
    text, expected = ROWS[case]
    done = convert(tmp_path, image, FOUR, text, "list.txt")
    assert done.status == 0, done.stderr
    assert stored(tmp_path, image) == dict(expected)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("./a/1.jpg", "a/1.jpg"),
        ("a\\1.jpg", "a/1.jpg"),
        ("C:\\photos\\images\\a\\1.jpg", "a/1.jpg"),
        ("/elsewhere/images/a/1.jpg", "a/1.jpg"),
        ("images/a/1", "a/1.jpg"),
        ("a b/c d.jpg", "a b/c d.jpg"),
        ('"a,b.jpg"', "a,b.jpg"),
        ("#1.jpg", "#1.jpg"),
    ],
)
def test_forms_of_paths(tmp_path: Path, image: bytes, path: str, name: str) -> None:
    done = convert(tmp_path, image, (name, "z.jpg"), f"{path},cat\nz.jpg,dog\n")
    assert done.status == 0, done.stderr
    assert stored(tmp_path, image) == {name: "cat", "z.jpg": "dog"}


SEPARATORS = "a tab, a semicolon, a vertical bar, a comma or a blank"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines("->"), "line 1: '00.jpg->cat' has the name of an image"),
        (
            "00:cat\n01:dog\n02:cat\n03:dog\n",
            f"each line begins with the name of an image, but has no class after {SEPARATORS}",
        ),
        ("".join(f"{name}\n" for name in FOUR), "line 1: '00.jpg' has the name of an image, but no class"),
        ("00\n01\n02\n03\n", "each line begins with the name of an image"),
        ("a.png\nb.png\nc.png\nd.png\n", "line 1: 'a.png' has the name of an image"),
        ("00.jpg;cat\n01.jpg\n", "list.csv, line 2: '01.jpg' has no class"),
        ("00.jpg cat\n01.jpg\n", "list.csv, line 2: '01.jpg' has no class"),
        ("00.jpg;cat\n;dog\n", "list.csv, line 2: 'dog' has no path"),
        ("00.jpg\n01.jpg cat\n02.jpg dog\n", "list.csv, line 1: '00.jpg' has no class"),
        ("00.jpg\n01.jpg;cat\n02.jpg;dog\n", "list.csv, line 1: '00.jpg' has no class"),
        ("filename\n00.jpg cat\n01.jpg dog\n", "list.csv: no column of classes among filename; name it class, label"),
        ("00.jpg,b'0'\n01.jpg,b'1'\n", "list.csv, line 1: the label is \"b'0'\" (how Python prints bytes)"),
        ("00.jpg,cat\n01.jpg,do\x1bg\n", "list.csv, line 2: the label has control characters: 'do\\x1bg'\n"),
        ("0\n1\n2\n[3]\n", "list.csv, line 4: the label is '[3]' (a list of values)"),
        ("00.jpg;cat\n9\x1b[31m.jpg;dog\n", "names 1 image missing from {0}/images: 9\\x1b[31m.jpg (line 2)\n"),
        ("cat;1\ndog;2\ncat;1\ndog;2\n", "names 4 images missing from {0}/images: cat (line 1)"),
        ("/data/train/00.jpg cat\n", "names 1 image missing from {0}/images: /data/train/00.jpg (line 1)"),
        ("00.jpg;cat\n".encode("utf-16-le"), "list.csv, line 1: not UTF-8 text"),
        (b"PK\x03\x04\xff\x00", "save the file as UTF-8 text, in Excel as 'CSV UTF-8'"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, image: bytes, text: str | bytes, message: str) -> None:
    done = convert(tmp_path, image, FOUR, text)
    assert done.status == 2
    assert message.format(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_numbers_in_lists_keep_their_order(tmp_path: Path, image: bytes) -> None:
    """Tools write numbers beside missing ones as floats. As names, 10.0 would come before 2.0."""
    done = convert(tmp_path, image, FOUR, "path,class\n00.jpg,1.0\n01.jpg,2.0\n02.jpg,10.0\n03.jpg,2.0\n")
    assert "warning: no sample has class 0" in done.stdout
    assert stored(tmp_path, image) == dict(zip(FOUR, ("1", "2", "10", "2"), strict=True))
    done = convert(tmp_path / "mixed", image, FOUR, "1\n2\n10\nunknown\n")
    assert "warning: some labels are numbers, such as '1', and some are not, such as 'unknown'" in done.stdout


def test_class_numbers_are_no_images(tmp_path: Path, image: bytes) -> None:
    """Images named 1.jpg, 2.jpg, ... do not make a column of class numbers a column of images."""
    names = ("1.jpg", "2.jpg", "3.jpg")
    done = convert(tmp_path, image, names, "1 2\n2 1\n3 1\n")
    assert done.status == 0, done.stderr
    assert stored(tmp_path, image) == {"1.jpg": "2", "2.jpg": "1", "3.jpg": "1"}
    done = convert(tmp_path, image, names, "img_1.jpg 3\nimg_2.jpg 1\n")
    assert "names 2 images missing from" in done.stderr


@pytest.mark.parametrize("text", ["00.jpg;cat\n01.jpg;dog\ngone.jpg;cat\n02.jpg;cat\n", "cat\ndog\ncat\ndog\n"])
def test_an_image_that_cannot_be_read_does_not_end_the_conversion(tmp_path: Path, image: bytes, text: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "gone.jpg").symlink_to("nowhere.jpg")
    done = convert(tmp_path, image, FOUR[:3], text)
    assert done.status == 0, done.stderr
    assert "left out: 1 file (1 broken symbolic link)" in done.stdout
    assert stored(tmp_path, image)["01.jpg"] == "dog"


def test_a_list_may_be_a_pipe(tmp_path: Path, image: bytes) -> None:
    """`--labels <(sort list)` can be read only once."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("00;cat\n01;dog\n",))
    writer.start()
    (tmp_path / "images").mkdir()
    for name in FOUR[:2]:
        (tmp_path / "images" / name).write_bytes(image + name.encode())
    done = run_main(main, "convert", tmp_path / "images", tmp_path / "out", "--labels", tmp_path / "pipe", "--workers", 1)
    writer.join()
    assert done.status == 0, done.stderr


@pytest.mark.parametrize(
    "text", ["0;polar bear\n1;dog\n", "0 polar bear\n1 dog\n", "0,polar bear\n1,dog\n", "polar bear\t0\ndog\t1\n"]
)
def test_class_names_have_the_same_separators(tmp_path: Path, image: bytes, text: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    (tmp_path / "images").mkdir()
    for name in FOUR[:2]:
        (tmp_path / "images" / name).write_bytes(image)
    (tmp_path / "list.txt").write_text("00.jpg 0\n01.jpg 1\n")
    arguments = ("--labels", tmp_path / "list.txt", "--class-names", tmp_path / "names.txt", "--workers", 1)
    done = run_main(main, "convert", tmp_path / "images", tmp_path / "out", *arguments)
    assert done.status == 0, done.stderr
    assert json.loads((tmp_path / "out" / "_info.json").read_text())["classes"] == ["dog", "polar bear"]
