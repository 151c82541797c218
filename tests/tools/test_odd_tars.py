"""Tars as other tools and damaged disks leave them: names with dots, compression, links, and headers that lie."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.shards.index import read_index, scan_tar
from pipelines.shards.shard_set import open_shards
from tests.helpers.runs import ROOT
from tests.pipelines.test_foreign import loader
from tests.pipelines.test_labels import gray
from tests.tools.test_odd_labels import findings, rejected, shards
from tests.tools.test_verify import Member, write_tar

BLOCK = 512


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def samples(*keys: str, image: str = "png", label: str = "cls") -> list[Member]:
    pairs = enumerate(keys)
    return [member for i, key in pairs for member in ((f"{key}.{image}", gray(i)), (f"{key}.{label}", b"%d" % i))]


def write(path: Path, members: list[Member]) -> Path:
    return write_tar(path, members, index=False)


def labels(folder: Path) -> list[int]:
    return sorted(open_shards(str(folder), "train").labels())


def refused(tar: Path, message: str, verbs: str = "info preview") -> None:
    """Checks that verbs of `shards` end with exit status 2 and one line."""
    options = {"preview": ("-o", tar.with_suffix(".png"), "--image-size", 32)}
    for verb in verbs.split():
        destination = (tar.parent.with_name(f"{verb}-of-{tar.name}"),) if verb == "convert" else ()
        done = shards(verb, tar, *destination, *options.get(verb, ()))
        assert (done.status, done.stderr.count("\n")) == (2, 1), (verb, done)
        assert message in done.stderr, verb


def reason_in_training(tar: Path) -> str:
    """Returns why the loader stops at the first sample."""
    with loader("dali", tar, on_error="stop") as batches, pytest.raises(ValueError, match="members") as raised:
        batches.next()
    return str(raised.value)


def test_compound_extensions_are_named_with_their_options(tmp_path: Path) -> None:
    tar = write(tmp_path / "tars" / "x.tar", samples("0", "1", image="input.png", label="outputs.cls"))
    message = (
        "no .cls among its members, .input.png .outputs.cls; the key of a sample ends at the first dot of the file name, and "
        "the rest is the extension; give --image-key input.png and --label-key outputs.cls (in training --data.image-key and "
        "--data.label-key)"
    )
    refused(tar, message)
    refused(tar, message.replace("no .cls", "no .cls or .json"), "convert")
    assert message in findings(tar)["0.input.png"][1]
    assert message in reason_in_training(tar)
    done = shards("index", tar)
    assert (done.status, "note: " in done.stdout, "--image-key input.png" in done.stdout) == (0, True, True)
    with loader("dali", tar, image_key="input.png", label_key="outputs.cls") as batches:
        assert batches.next()["target"].tolist() == [0, 1]


def test_a_mask_is_never_taken_for_the_image(tmp_path: Path) -> None:
    members = [("0.png", gray(0)), ("0.seg.png", gray(9)), ("0.cls", b"0"), ("1.seg.png", gray(9)), ("1.cls", b"1")]
    tar = write(tmp_path / "tars" / "x.tar", members)
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert labels(tmp_path / "out") == [0]
    assert "no image among its members, .seg.png .cls" in rejected(tmp_path / "out")["x/1"]
    members = [*samples("0"), ("1.png", gray(1)), ("1.seg.png", gray(9)), ("1.seg.json", b'{"label": 7}')]
    assert shards("convert", write(tmp_path / "more" / "x.tar", members), tmp_path / "out2").status == 0
    assert rejected(tmp_path / "out2").keys() == {"x/1"}


def test_keys_with_dots_are_explained_and_converted(tmp_path: Path) -> None:
    """WebDataset would make one sample of all tracks of an album, and an index shows blanks as underscores."""
    keys = [f"al bum/Track {i // 2}.{i % 2} (v{i})" for i in range(4)]
    tar = write(tmp_path / "tars" / "x.tar", samples(*keys))
    message = "and here the names have more dots; rename the files, or write new shards with `shards convert`"
    refused(
        tar,
        ".0 (v0).png .0 (v0).cls .1 (v1).png .1 (v1).cls; "
        f"the key of a sample ends at the first dot of the file name, {message}",
    )
    assert message in findings(tar)["al bum/Track 0.0 (v0).png"][1]
    assert message in reason_in_training(tar)
    done = shards("convert", tar, tmp_path / "out")
    assert (done.status, "warning: the members of 4 samples form no WebDataset samples" in done.stdout) == (0, True)
    assert labels(tmp_path / "out") == [0, 1, 2, 3]


@pytest.mark.parametrize("folder", ["", "a/"])
def test_labels_apart_from_their_images_are_joined(tmp_path: Path, folder: str) -> None:
    both = samples(*(f"{folder}{i}" for i in range(30)))
    tar = write(tmp_path / "tars" / "x.tar", [*both[::2], *both[1::2], ("30.png", gray(1)), ("31.cls", b"1")])
    message = "no .cls among its members, .png; its .cls is in the tar, but not next to it; `shards convert` writes new shards"
    refused(tar, message)
    assert message in findings(tar)[f"{folder}0.png"][1]
    assert message in reason_in_training(tar)
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert labels(tmp_path / "out") == [*range(30)]
    assert rejected(tmp_path / "out").keys() == {"x/30", "x/31"}


def test_members_of_one_key_are_joined_only_if_they_are_clear(tmp_path: Path) -> None:
    members = [("0.png", gray(0)), ("1.png", gray(1)), ("0.cls", b"0"), ("1.cls", b"1"), ("0.png", gray(2)), *samples("2")]
    tar = write(tmp_path / "tars" / "x.tar", members)
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert labels(tmp_path / "out") == [0, 1]
    assert rejected(tmp_path / "out") == {"x/0": "several images or labels with this key lie apart in the tar"}


@pytest.mark.parametrize("member", [("0.cls", b"1"), ("0.png", gray(1))])
def test_a_sample_with_two_labels_or_images_is_left_out(tmp_path: Path, member: Member) -> None:
    """Which of the two belongs to it cannot be known. A neighbor whose name was damaged looks like this."""
    tar = write(tmp_path / "tars" / "x.tar", [*samples("0"), member, *samples("1", "2", "3")])
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert rejected(tmp_path / "out") == {"x/0.png": f"the sample has several members that end in {member[0][1:]}"}
    assert "0.png" in findings(tar)


COMPRESS: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "gzip": (gzip.compress, ".gz", "gunzip"),
    "bzip2": (bz2.compress, ".bz2", "bunzip2"),
    "xz": (lzma.compress, ".xz", "unxz"),
}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_shards(tmp_path: Path, kind: str) -> None:
    """All verbs name the command that unpacks them; `convert` reads them."""
    compress, ending, command = COMPRESS[kind]
    plain = write(tmp_path / "x.tar", samples("0", "1"))
    (tmp_path / "tars").mkdir()
    for name, words in (
        (f"x.tar{ending}", f"`{command} {{}}`"),
        ("x.tar", f"`mv {{0}} {{0}}{ending} && {command} {{0}}{ending}`"),
        (f"x.t{ending[1:]}", f"`{command} {{}}`"),
    ):
        tar = tmp_path / "tars" / name
        tar.write_bytes(compress(plain.read_bytes()))
        message = f"{tar}: compressed ({kind}); unpack it with {words.format(tar)}"
        refused(tar, message, "info index")
        assert message.partition(": ")[2] in findings(tar)[""][1]
        with pytest.raises(ValueError, match=rf"compressed \({kind}\)"):
            open_shards(str(tar), "train")
        out = tmp_path / f"out-{name}"
        assert shards("convert", tar, out).status == 0
        assert labels(out) == [0, 1]
        assert not any(path.name.startswith(".") for path in out.iterdir())
        shutil.copy(plain, tmp_path / "tars" / "y.tar")  # an index beside a compressed tar is no excuse
        (tmp_path / "tars" / "x.idx").write_text((tmp_path / "tars" / "x.idx").read_text() if tar.stem == "y" else "v1.2 0\n")
        with pytest.raises(ValueError, match=rf"compressed \({kind}\)|none of them has a sample"):
            open_shards(str(tar), "train")
        (tmp_path / "tars" / "x.idx").unlink()
        tar.unlink()


def test_a_name_that_begins_like_bzip2_is_not_compressed(tmp_path: Path) -> None:
    tar = write(tmp_path / "tars" / "x.tar", samples("BZh", "BZh9_0"))
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert labels(tmp_path / "out") == labels(tar.parent) == [0, 1]
    listed = write(tmp_path / "flat.tar", [("0.png", gray(0))])
    with tarfile.open(listed, "a") as flat:
        add(flat, "1.png", tarfile.SYMTYPE, link="0.png")
    (tmp_path / "list.csv").write_text("0.png,a\n1.png,b\n")
    assert shards("convert", listed, tmp_path / "out3", "--labels", tmp_path / "list.csv").status == 0
    assert rejected(tmp_path / "out3") == {"1.png": "a symbolic link to 0.png"}


def test_what_cannot_be_unpacked_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(write(tmp_path / "x.tar", samples("0", "1")).read_bytes())
    (tmp_path / "tars").mkdir()
    for name, content, message in (
        ("flipped.tar.gz", packed[:30] + bytes([packed[30] ^ 255]) + packed[31:], "damaged gzip file ("),
        ("x.tar.zst", b"\x28\xb5\x2f\xfd rest", "compressed (zstd); unpack it with `unzstd --rm "),
        ("text.tar.gz", b"hello", "not a readable tar ("),
        ("twice.tar.gz", gzip.compress(packed), "compressed (gzip); unpack it with"),
    ):
        (tmp_path / "tars" / name).write_bytes(content)
        refused(tmp_path / "tars" / name, message, "convert")
    refused(tmp_path / "tars" / "x.tar.zst", "compressed (zstd); unpack it with `unzstd --rm ", "info index")


def add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    tar.addfile(member, io.BytesIO(data))


def test_hard_links_are_followed_and_others_are_named(tmp_path: Path) -> None:
    tar = tmp_path / "tars" / "x.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        for i in range(2):
            add(file, f"./{i}.png", data=gray(i))
            add(file, f"./{i}.cls", data=b"%d" % i)
        add(file, "2.png", tarfile.LNKTYPE, link="./1.png")
        add(file, "2.cls", tarfile.LNKTYPE, link="0.cls")
        add(file, "3.png", tarfile.LNKTYPE, link="2.png")  # a chain
        add(file, "3.cls", data=b"1")
        for name, kind, link in (
            ("4", tarfile.SYMTYPE, "/etc/passwd"),
            ("5", tarfile.LNKTYPE, "9.png"),
            ("6", tarfile.FIFOTYPE, ""),
            ("7", tarfile.CHRTYPE, ""),
            ("8", tarfile.DIRTYPE, ""),
        ):
            add(file, f"{name}.png", kind, link=link)
            add(file, f"{name}.cls", data=b"0")
        add(file, "9.png", tarfile.SYMTYPE, link="1.png")
    way_out = "`tar --dereference --hard-dereference` stores files in place of links"
    reasons = {
        "4": f"4.png is a symbolic link to /etc/passwd; {way_out}",
        "5": f"5.png is a hard link to 9.png, which is not in front of it in the tar; {way_out}",
        "6": "6.png is a FIFO",
        "7": "7.png is a device",
        "8": "8.png is a folder",
    }
    found = {member.removesuffix(".cls"): detail for member, (kind, detail) in findings(tar).items() if kind == "missing-image"}
    with loader("dali", tar, max_bad_fraction=1.0, quarantine_file=tmp_path / "q.jsonl") as batches:
        assert [label for batch in batches for label in batch["target"].tolist()] == [0, 1, 0, 1]
    lines = map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    in_training = {line["member"].removesuffix(".cls"): line["reason"] for line in lines}
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert labels(tmp_path / "out") == [0, 0, 1, 1]
    left_out = {path.removeprefix("x/"): reason for path, reason in rejected(tmp_path / "out").items()}
    assert left_out.pop("9") == "9.png is a symbolic link to 1.png"
    for reported in (found, in_training, left_out):
        assert reported == {key: f"no image among its members, .cls; {reason}" for key, reason in reasons.items()}


def test_an_index_of_hard_links_is_right_and_one_bad_label_costs_one_sample(tmp_path: Path) -> None:
    tar = tmp_path / "tars" / "x.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        for name, data in samples("0", "1"):
            add(file, name, data=data)
        add(file, "2.png", tarfile.LNKTYPE, link="0.png")
        add(file, "2.cls", data=b"bad")
    assert shards("index", tar).status == 0
    assert findings(tar).keys() == {"2.cls"}
    assert shards("verify", tar, "--quarantine", "--workers", 1).status == 3
    assert [sample[0].name for sample in read_index(tar.with_suffix(".idx"))] == ["0.png", "1.png"]


def test_sparse_members_are_not_read_as_images(tmp_path: Path) -> None:
    tar = tmp_path / "tars" / "x.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("0.png")
        member.size, member.pax_headers = len(gray(0)), {"GNU.sparse.map": "0,10", "GNU.sparse.size": "5000"}
        file.addfile(member, io.BytesIO(gray(0)))
        add(file, "0.cls", data=b"0")
        for name, data in samples("1"):
            add(file, name, data=data)
    assert [[part.extension for part in sample] for sample in scan_tar(tar)] == [["cls"], ["png", "cls"]]
    assert "0.png is a sparse file" in findings(tar)["0.cls"][1]


def test_no_member_touches_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    names = ["../../up", f"{tmp_path}/absolute", "//double", "..", "a/../../b"]
    tar = write(folder / "tars" / "x.tar", samples(*names))
    before = sorted(tmp_path.rglob("*"))
    findings(tar)
    shards("info", tar)
    assert shards("convert", tar, tmp_path / "deep" / "out").status == 0
    added = {path.relative_to(tmp_path).parts[:2] for path in set(tmp_path.rglob("*")) - set(before)}
    assert added <= {("deep", "out"), ("cache",), ("cache", "googlenet-dali")}, added


def header(kind: bytes = tarfile.REGTYPE, name: str = "0.png", size: bytes = b"") -> bytes:
    """Returns a header whose size field holds any bytes."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header(kind, "pax", b"%o" % len(records)) + records + bytes(-len(records) % BLOCK)


def record(keyword: str, value: str) -> bytes:
    body = f" {keyword}={value}\n".encode()
    length = len(body) + len(str(len(body) + 2))
    return str(length).encode() + body


LIES = {
    "gnu-long-name": header(b"L", "long", base256(2**60)),
    "gnu-long-name-2-gib": header(b"L", "long", base256(2**31)),
    "gnu-long-link": header(b"K", "long", base256(2**60)),
    "gnu-negative": header(b"L", "long", base256(-512)),
    "base-256": header(size=base256(2**70)),
    "base-256-negative": header(size=base256(-1024)),
    "octal": header(size=b"77777777777"),
    "octal-negative": header(size=b"-0000001000"),
    "pax-length": header(tarfile.XHDTYPE, "pax", base256(2**40)),
    "pax-length-negative": header(tarfile.XHDTYPE, "pax", base256(-1)),
    "pax-size": pax(record("size", str(10**20))) + header(),
    "pax-size-negative": pax(record("size", "-5000")) + header(),
    "pax-size-nonsense": pax(record("size", "many")) + header(size=b"1000") + b"x" * BLOCK,
    "pax-size-digits": pax(record("size", "9" * 6000)) + header(size=b"1000") + b"x" * BLOCK,
    "pax-global-size": pax(record("size", str(10**20)), tarfile.XGLTYPE),
    "pax-record-length": pax(b"99999999999999999999 size=1\n") + header(),
    "pax-record-zero": pax(b"0 size=1\n") + header(),
    "pax-sparse-map": pax(record("GNU.sparse.map", "0,x")) + header(),
    "pax-sparse-1.0": pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"))
    + header(size=b"1000")
    + b"9" * BLOCK,
    "pax-sparse-realsize": pax(record("GNU.sparse.map", "0,1") + record("GNU.sparse.realsize", "x")) + header(),
    "long-names-in-a-chain": (header(b"L", "long", b"1") + bytes(BLOCK)) * 5000,
    "pax-in-a-chain": pax(record("path", "a")) * 5000,
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_one_line_in_every_command(tmp_path: Path, lie: str) -> None:
    good = write(tmp_path / "good.tar", samples("1", "2")).read_bytes()
    tar = tmp_path / "tars" / "x.tar"
    tar.parent.mkdir()
    tar.write_bytes(LIES[lie] + good)
    with pytest.raises(ValueError, match=r"x\.tar: (not a readable tar \(|damaged)") as raised:
        scan_tar(tar)
    assert str(raised.value).isprintable()
    refused(tar, str(raised.value), "info index")
    refused(tar, str(raised.value), "convert")
    assert findings(tar)[""][0] == "damaged-tar"
    outer = write(tmp_path / "outer" / "set.tar", [("class.tar", tar.read_bytes())])
    refused(outer, f"{outer}: class.tar: ", "convert")


SCAN = """
import sys, tracemalloc
from pipelines.shards.index import scan_tar
tracemalloc.start()
for tar in sys.argv[1:]:
    try:
        scan_tar(tar)
    except ValueError:
        print(tracemalloc.get_traced_memory()[1])
"""


def test_nothing_that_a_header_announces_is_allocated(tmp_path: Path) -> None:
    for lie, headers in LIES.items():
        (tmp_path / f"{lie}.tar").write_bytes(headers)
    command = [sys.executable, "-c", SCAN, *map(str, tmp_path.glob("*.tar"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    assert len(peaks) == len(LIES)
    assert max(peaks) < 30_000_000


def test_a_size_just_beyond_the_end_is_noticed_before_the_member_is_used(tmp_path: Path) -> None:
    data = gray(3)
    good = write(tmp_path / "good.tar", samples("0")).read_bytes()[: -2 * BLOCK].rstrip(b"\0")
    good += bytes(-len(good) % BLOCK)
    tar = tmp_path / "x.tar"
    tar.write_bytes(good + header(name="1.png", size=b"%o" % (len(data) + 1)) + data)
    with pytest.raises(ValueError, match=r"the header of 1\.png announces a size that the file does not have"):
        scan_tar(tar)
    tar.write_bytes(good + header(name="1.png", size=b"%o" % len(data)) + data)
    with pytest.raises(ValueError, match=r"not a readable tar \(unexpected end of data\)"):
        scan_tar(tar)


def test_a_tar_in_a_tar_ends_where_its_member_ends(tmp_path: Path) -> None:
    """Its members must not reach into the tar around it."""
    inner = header(name="a.png", size=b"%o" % 5000) + gray(0)
    tar = write(tmp_path / "tars" / "set.tar", [("ant.tar", inner), ("bee.tar", bytes(20000))])
    refused(
        tar, f"{tar}: ant.tar: not a readable tar (the header of a.png announces a size that the file does not have)", "convert"
    )


def test_system_folders_in_tars_are_no_classes(tmp_path: Path) -> None:
    names = ["ant/1.png", "ant/@eaDir/1.png", "bee/2.png", "__MACOSX/bee/._2.png", "./.Trash/3.png", "lost+found/4.png"]
    tar = write(tmp_path / "tars" / "x.tar", [(name, gray(i)) for i, name in enumerate(names)])
    done = shards("convert", tar, tmp_path / "out")
    assert (done.status, open_shards(str(tmp_path / "out"), "train").classes) == (0, ("ant", "bee"))
    assert labels(tmp_path / "out") == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not an index file; it is empty"),
        (b"v1.2 \xc2\xb2\n", "not an index file; its first line is"),
        (b"v1.2 " + b"9" * 5000, "not an index file; its first line is"),
        (
            b"v1.2 99999999999\npng 512 %d 0.png cls 1536 1 0.cls\n",
            "damaged index; 99999999999 samples announced, in a file of",
        ),
        (b"v1.2 1\npng 999999999999999 1 0.png cls 1536 1 0.cls\n", "not an index of"),
        (b"v1.2 1\npng %s 1 0.png\n" % (b"9" * 5000), "are not both numbers"),
        (b"v1.2 1\npng 512 -1 0.png\n", "are not both numbers"),
        ("v1.2 1\npng \u0665 1 0.png\n".encode(), "are not both numbers"),
        (b"v1.2 1\n\xff\xfe\n", "is not made of four fields"),
        (b"v1.2 1\npng 512 1 \x1b[31m\xff 9\n", "is not made of four fields"),
    ],
)
def test_damaged_index_files_are_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    tar = write(tmp_path / "tars" / "x.tar", samples("0"))
    tar.with_suffix(".idx").write_bytes(text.replace(b"%d", b"%d" % len(gray(0))))
    refused(tar, message)
    assert findings(tar)[""][0] == "wrong-index"
    with pytest.raises(ValueError, match=r"x\.idx: "):
        open_shards(str(tar), "train")


def test_an_index_that_points_beyond_its_tar(tmp_path: Path) -> None:
    """In a later sample, which no command compares with the tar when it starts. 2 GB are not allocated for it."""
    tar = write_tar(tmp_path / "tars" / "x.tar", samples("0", "1"))
    lines = tar.with_suffix(".idx").read_text().splitlines()
    for offset, size in ((10**17, 1), (512, 2**31 - 1), (10**17, 10**17)):
        tar.with_suffix(".idx").write_text(f"{lines[0]}\n{lines[1]}\npng {offset} {size} 1.png cls {offset} {size} 1.cls\n")
        os.utime(tar.with_suffix(".idx"))
        with loader("dali", tar) as batches, pytest.raises(ValueError, match=r"x\.idx: damaged index"):
            batches.next()
        with pytest.raises(ValueError, match=r"x\.tar: damaged index, or the index of another tar .*; it lists bytes from"):
            open_shards(str(tar), "train").labels()
        refused(tar, "writes it anew); it lists bytes from", "info")
