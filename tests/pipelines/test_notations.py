"""The notations of shards: names of splits, `~`, `file:` and `http:`, patterns in messages, and what is not read."""

import contextlib
import functools
import gzip
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.remote import retrying
from pipelines.shards.shard_set import open_shards
from tests.helpers import checkpoints
from tests.helpers.command import run_main
from tools.evaluate.cli import main as evaluate
from tools.predict.cli import main as predict
from tools.shards.cli import main as shards_main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def renamed(shards: Path, folder: Path, **names: str) -> Path:
    """Copies the data set with other names of the splits `train` and `valid`."""
    info = json.loads((shards / "_info.json").read_text())
    splits = {}
    folder.mkdir()
    for old, new in names.items():
        files = info["splits"][old]["filenames"]
        splits[new] = {"filenames": [name.replace(old, new) for name in files]}
        for name in files:
            shutil.copy(shards / name, folder / name.replace(old, new))
    (folder / "_info.json").write_text(json.dumps({**info, "splits": splits}))
    return folder


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_other_names_of_the_validation_split(shards: Path, tmp_path: Path, name: str) -> None:
    folder = renamed(shards, tmp_path / "x", train="training", valid=name)
    assert open_shards(str(folder), "valid").num_samples == 25
    assert open_shards(str(folder), "train").num_samples == 61
    assert open_shards(str(folder), "val").num_samples == 25


def test_the_exact_name_comes_first_and_two_others_are_ambiguous(shards: Path, tmp_path: Path) -> None:
    both = renamed(shards, tmp_path / "both", train="val", valid="valid")
    assert open_shards(str(both), "valid").num_samples == 25
    unclear = renamed(shards, tmp_path / "unclear", train="val", valid="validation")
    with pytest.raises(
        ValueError, match=r"the splits val, validation, and each of them may be 'valid'; name .* '.*'$"
    ) as error:
        open_shards(str(unclear), "valid")
    assert open_shards(str(error.value).split("'")[-2], "valid").num_samples == 61


@pytest.mark.parametrize("odd", ["plain", "a[1] b", "a{b,c}"])
def test_patterns_in_messages_match(shards: Path, tmp_path: Path, odd: str) -> None:
    """The example is one that works, or there is none."""
    folder = renamed(shards, tmp_path / odd, train="test", valid="testing")
    messages = []
    for has_info in (True, False):
        if not has_info:
            (folder / "_info.json").unlink()
        with pytest.raises(ValueError, match=r"name ") as error:
            open_shards(str(folder), "valid")
        messages.append(str(error.value))
    for message in messages:
        if "{" in odd:
            assert "for example" not in message
        else:
            assert open_shards(message.split("for example '")[1].rstrip("'"), "x").num_samples == 61


def test_no_pattern_for_files_without_a_common_name(tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        (tmp_path / name).touch()
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"test": {"filenames": ["one.tar", "two.tar"]}}}))
    with pytest.raises(ValueError, match=r"none called 'valid'; name the shards themselves$"):
        open_shards(str(tmp_path), "valid")


@pytest.fixture
def home(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, with the shards in `my shards`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(shards, tmp_path / "home" / "my shards")
    return tmp_path / "home"


def test_home_and_file_urls(home: Path) -> None:
    expected = open_shards(str(home / "my shards"), "train").tars
    for location in (
        "~/my shards",
        f"file://{home}/my%20shards",
        f"file://localhost{home}/my shards",
        f"file:{home}/my shards",
    ):
        for ending in ("", "/train-*.tar", "/train-{000000..000003}.tar", "/train-00000?.tar"):
            assert open_shards(location + ending, "train").tars == expected
    (home / "names").write_text("ant\nbee\ncat\n")
    (home / "indices").mkdir()
    assert open_shards("~/my shards", "train", "~/indices", class_file="~/names").label_reader.class_file == str(home / "names")
    for wrong in ("file://other/x.tar", "file:x.tar"):
        with pytest.raises(ValueError, match=r"three slashes: file:///"):
            open_shards(wrong, "train")


@pytest.mark.parametrize("arguments", [["info"], ["verify", "--check", "none"], ["index"], ["preview", "-o", "~/sheet.png"]])
def test_home_in_every_verb(home: Path, arguments: list[str]) -> None:
    verb, *options = arguments
    for location in ("~/my shards/valid-*.tar", f"file://{home}/my shards/valid-*.tar"):
        extra = ["--samples", 1, "--views", 1, "--image-size", 32] if verb == "preview" else ["--workers", 1]
        done = run_main(shards_main, verb, location, *options, *extra)
        assert (done.status, done.stderr) == (0, ""), location
    assert verb != "preview" or (home / "sheet.png").exists()


def test_home_in_a_conversion(home: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "images").symlink_to(image_folder)
    monkeypatch.chdir(tmp_path)
    done = run_main(shards_main, "convert", "~/images", f"file://{home}/out", "--workers", 1, "--name=valid")
    assert (done.status, done.stderr) == (0, "")
    assert (home / "out" / "_info.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name not in ("home", "cache")]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:aws s3 cp s3://b/x.tar -", ": commands are not run; paths, and URLs that begin with s3://, gs://"),
        ("s3:/b/x-*.tar", "a URL begins with s3://, as in s3://b/x-*.tar"),
        ("S3://b/x.tar", "a URL begins with s3://, as in s3://b/x.tar"),
        ("gs:b/x.tar", "a URL begins with gs://, as in gs://b/x.tar"),
        (r"C:\data\x-*.tar", "this is a Windows path"),
        (r"\\server\share\x.tar", "this is a Windows path"),
    ],
)
def test_what_is_not_read(location: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_shards(location, "train")
    assert message in str(error.value)
    done = run_main(predict, tmp_path / "no.pt", location)
    assert done.status in (1, 2)


def test_a_name_like_another_notation_is_read_if_it_exists(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:x.tar", "s3:x.tar", r"C:\x.tar", "a[1].tar", "{1}.tar", r"a\b.tar"):
        shutil.copy(shards / "valid-000000.tar", name)
        assert open_shards(name, "valid").num_samples == 10


def test_only_relative_paths_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"no such shard: 'x\.tar'; looked from {tmp_path}$"):
        open_shards("x.tar", "train")
    with pytest.raises(ValueError, match=rf"no such shard: '{tmp_path}/x-\*\.tar'$"):
        open_shards(f"{tmp_path}/x-*.tar", "train")


@pytest.mark.parametrize("verb", ["info", "verify", "index"])
def test_a_folder_of_compressed_tars(shards: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.tar.gz").write_bytes(b"not gzip")
    done = run_main(shards_main, verb, tmp_path / "x")
    assert done.stderr == f"error: no .tar files in folder {tmp_path}/x\n"
    (tmp_path / "x" / "b.tar.gz").write_bytes(gzip.compress((shards / "valid-000000.tar").read_bytes()))
    done = run_main(shards_main, verb, tmp_path / "x")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "b.tar.gz: compressed (gzip); unpack it with `gunzip " in done.stderr


class _Files(http.server.SimpleHTTPRequestHandler):
    """Serves files, in ranges unless `ranges` is false."""

    ranges = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if not (self.ranges and asked and path.is_file()):
            super().do_GET()
            return
        content = path.read_bytes()
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


@contextlib.contextmanager
def served(folder: Path, handler: type[_Files]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_tars_of_a_web_server(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("_info.json", *(f"valid-00000{number}.tar" for number in range(3))):
        shutil.copy(shards / name, folder)
    with served(folder, _Files) as url:
        found = open_shards(f"{url}/valid-{{000000..000002}}.tar", "valid")
        assert (found.num_samples, found.classes) == (25, ("ant", "bee", "cat"))
        assert open_shards(f"{url}/valid-000001.tar", "valid").num_samples == 10
        with pytest.raises(ValueError, match=r"no such shard: 'http://.*/gone\.tar'"):
            open_shards(f"{url}/gone.tar", "valid")
    monkeypatch.setattr(retrying, "PATIENCE_SECONDS", 0.3)
    with pytest.raises(OSError, match=r"valid-000001\.tar: only errors for 0 s; .*Cannot connect to host"):
        open_shards(f"{url}/valid-000001.tar", "valid")


def test_a_web_server_without_ranges(shards: Path, tmp_path: Path) -> None:
    """Such a server sends whole files, so that a few bytes would cost a shard each time."""
    (tmp_path / "bare").mkdir()
    shutil.copy(shards / "valid-000000.tar", tmp_path / "bare")
    with (
        served(tmp_path / "bare", type("Whole", (_Files,), {"ranges": False})) as url,
        pytest.raises(ValueError, match=r"valid-000000\.tar: .*: it does not support range requests; copy the shards"),
    ):
        open_shards(f"{url}/valid-000000.tar", "valid")


@pytest.mark.parametrize("broken", ["file", "missing home"])
def test_a_cache_folder_that_cannot_be_made_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(shards / "valid-000000.tar", tmp_path / "bare")
    if broken == "file":
        (tmp_path / "cache").touch()
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", "/proc/none")
    done = run_main(shards_main, "info", tmp_path / "bare")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "googlenet-dali/index: the user's cache folder cannot be written to (" in done.stderr
    assert "set XDG_CACHE_HOME to another folder, or let `shards index` write" in done.stderr
    assert run_main(shards_main, "index", tmp_path / "bare").status == 0
    assert run_main(shards_main, "info", tmp_path / "bare").status == 0  # the way out leads out


def test_other_names_in_all_commands(shards: Path, tmp_path: Path) -> None:
    checkpoint, folder = checkpoints.write(tmp_path / "best.pt"), renamed(shards, tmp_path / "x", train="train", valid="val")
    done = run_main(evaluate, checkpoint, folder, "--device", "cpu", "--torch-threads", 1, "--threads", 1, "--json")
    assert (done.status, json.loads(done.stdout)["samples"]) == (0, 25), done.stderr
    done = run_main(predict, checkpoint, folder, "--device", "cpu", "--threads", 1, "--json")
    assert (done.status, done.stdout.count("\n")) == (0, 25), done.stderr
    small = ("-o", tmp_path / "sheet.png", "--samples", 1, "--views", 1, "--image-size", 32)
    done = run_main(shards_main, "preview", folder, "--split", "valid", *small)
    assert (done.status, "1 sample, 0 of them" in done.stdout) == (0, True), done.stderr
