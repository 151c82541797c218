"""`shards convert` keeps images unchanged, unless options require otherwise or training cannot read them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shards.shard_set import open_shards
from tests.conftest import write_image, write_tree
from tests.helpers.command import run_main
from tests.helpers.odd_images import png_header
from tests.tools.test_shards_command import digests, read_with_webdataset, shards_command
from tools.shards.cli import main


def convert_and_read(folder: Path, *options: object) -> dict[str, tuple[str, bytes]]:
    """Returns extension and bytes of each stored image, by the end of its key."""
    out = folder.parent / "out"
    done = shards_command("convert", folder, out, "--overwrite", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no messages of libjpeg and libpng
    stored = {}
    for sample in read_with_webdataset(open_shards(str(out), "train").tars):
        extension = next(key for key in sample if key not in ("cls", "__key__", "__url__", "__local_path__"))
        stored[sample["__key__"].rpartition("_")[2]] = (extension, sample[extension])
    return stored


def opened(stored: tuple[str, bytes]) -> Image.Image:
    return Image.open(io.BytesIO(stored[1]))


def test_resize_shrinks_the_shorter_side_and_never_enlarges(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    sizes = {"wide": (300, 120), "tall": (100, 333), "small": (50, 63), "exact": (64, 90)}
    for i, (name, size) in enumerate(sizes.items()):
        write_image(folder / "a" / f"{name}.jpg", i, size, quality=90)
    write_image(folder / "a" / "lossless.png", 9, (200, 100))
    write_image(folder / "a" / "bitmap.bmp", 10, (200, 100))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # EXIF orientation: rotated by 90 degrees
    write_image(folder / "a" / "turned.jpg", 11, (150, 100), exif=rotated)
    stored = convert_and_read(folder, "--resize", 64)
    assert {name: opened(data).size for name, data in stored.items()} == {
        "wide": (160, 64),
        "tall": (64, 213),
        "small": (50, 63),
        "exact": (64, 90),
        "lossless": (128, 64),
        "bitmap": (128, 64),
        "turned": (64, 96),
    }
    assert {name: extension for name, (extension, _) in stored.items()} == {
        **dict.fromkeys(("wide", "tall", "small", "exact", "bitmap", "turned"), "jpg"),
        "lossless": "png",
    }
    for name in ("small", "exact"):
        assert stored[name][1] == (folder / "a" / f"{name}.jpg").read_bytes()
    expected = Image.open(folder / "a" / "lossless.png").resize((128, 64), Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(opened(stored["lossless"]), np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= 2


def test_quality_and_format(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_image(folder / "a" / "photo.jpg", 1, (200, 150), quality=95)
    write_image(folder / "a" / "drawing.png", 2, (200, 150))
    stored = convert_and_read(folder, "--format", "jpeg")
    assert stored["photo"][1] == (folder / "a" / "photo.jpg").read_bytes()
    assert opened(stored["drawing"]).format == "JPEG"
    rough = convert_and_read(folder, "--format", "jpeg", "--quality", 20)
    assert len(rough["drawing"][1]) < len(stored["drawing"][1]) / 2
    webp = convert_and_read(folder, "--format", "webp", "--resize", 100)
    assert {(extension, opened((extension, data)).format) for extension, data in webp.values()} == {("webp", "WEBP")}
    assert {opened(data).size for data in webp.values()} == {(133, 100)}


def test_what_training_cannot_decode_is_reencoded_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("one.gif", "two.gif", "three.avif"):
        write_image(folder / "a" / name, 1)
    write_image(folder / "a" / "plain.jpg", 2)
    moving = (folder / "a" / "one.gif").read_bytes()
    (folder / "a" / "broken.gif").write_bytes(moving[: len(moving) // 2])
    photo = bytearray((folder / "a" / "three.avif").read_bytes())
    photo[photo.index(b"iloc")] ^= 1  # Pillow's plugin raises an error of its own for this
    (folder / "a" / "broken.avif").write_bytes(photo)
    done = shards_command("convert", folder, tmp_path / "out", "--json")
    summary = json.loads(done.stdout)
    assert summary["changes"] == {"AVIF encoded as jpg": 1, "GIF encoded as jpg": 2}
    assert summary["rejected"] == {"damaged GIF image": 1, "avif image that the training decoder cannot read": 1}
    assert summary["shard_lengths"] == [4]
    stored = convert_and_read(folder)
    original = np.asarray(Image.open(folder / "a" / "three.avif").convert("RGB"), np.int16)
    assert np.abs(np.asarray(opened(stored["three"]), np.int16) - original).mean() < 4


@pytest.mark.parametrize("level", ["decode", "structure", "none"])
def test_levels_of_checking(tmp_path: Path, level: str) -> None:
    folder = write_tree(tmp_path / "images", 6)
    good = (folder / "ant" / "000.jpg").read_bytes()
    (folder / "ant" / "short.jpg").write_bytes(good[: len(good) // 2])
    write_image(folder / "ant" / "hole.png", 7)
    whole = (folder / "ant" / "hole.png").read_bytes()
    (folder / "ant" / "longer.png").write_bytes(whole + bytes(5000))  # some editors append bytes of their own
    (folder / "ant" / "hole.png").write_bytes(whole[:500] + bytes(500) + whole[1000:])  # header and end are intact
    (folder / "ant" / "text.jpg").write_text("no image")
    (folder / "ant" / "text.txt").write_text("no image")
    write_image(folder / "ant" / "wave.jp2", 8)  # encoded anew at each level
    stored = convert_and_read(folder, "--check", level)
    good_ones = {*(f"00{i}" for i in range(6)), "longer", "wave"}
    kept = {"decode": good_ones, "structure": good_ones | {"hole"}, "none": good_ones | {"hole", "short", "text"}}
    assert set(stored) == kept[level]
    assert opened(stored["wave"]).format == "JPEG"


def test_shard_bytes(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images", 30)
    out = tmp_path / "out"
    assert shards_command("convert", folder, out, "--shard-bytes", "60kB").returncode == 0
    sizes = [path.stat().st_size for path in sorted(out.glob("*.tar"))]
    assert len(sizes) > 3
    assert max(sizes) <= 60_000
    assert min(sizes[:-1]) > 40_000
    assert shards_command("convert", folder, out, "--shard-bytes", "1", "--overwrite").returncode == 0
    assert open_shards(str(out), "train").num_samples == len(list(out.glob("*.tar"))) == 30


def test_the_number_of_workers_and_the_place_do_not_matter(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images", 30)
    write_image(folder / "bee" / "moving.gif", 1)
    (folder / "cat" / "bad.jpg").write_text("no image")
    written = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        done = shards_command("convert", folder, out, "--shard-samples", 4, "--resize", 70, "--workers", workers)
        assert done.returncode == 0, done.stderr
        written.append(digests(out))
        folder = folder.rename(tmp_path / f"elsewhere{workers}")
    assert written[0] == written[1]


def test_images_with_too_many_pixels(tmp_path: Path) -> None:
    """Their headers are enough. Nobody allocates the pixels, also not of a format that only Pillow reads."""
    folder = tmp_path / "images" / "a"
    write_image(folder / "good.png", 1, (90, 70))
    write_image(folder / "canvas.gif", 1)
    gif = (folder / "canvas.gif").read_bytes()
    (folder / "canvas.gif").write_bytes(gif[:6] + b"\x60\xea\x60\xea" + gif[10:])  # 60,000 x 60,000
    (folder / "wide.png").write_bytes(png_header(30_000, 30_000))
    write_image(folder / "wide.jpg", 1)
    jpeg = (folder / "wide.jpg").read_bytes()
    place = jpeg.index(b"\xff\xc0") + 5
    (folder / "wide.jpg").write_bytes(jpeg[:place] + b"\x75\x30\x75\x30" + jpeg[place + 4 :])
    write_image(folder / "below.bmp", 1, (60, 64))
    bmp = (folder / "below.bmp").read_bytes()
    (folder / "below.bmp").write_bytes(bmp[:22] + b"\0\0\0\x80" + bmp[26:])  # top-down, 2^31 lines
    limit = "more than the limit of 89,478,485 (--max-pixels)"
    done = run_main(main, "convert", tmp_path / "images", tmp_path / "out", "--json", "--workers", 1)
    assert json.loads(done.stdout)["rejected"] == {
        f"30000x30000 pixels, {limit}": 2,
        f"60x2147483648 pixels, {limit}": 1,
        "more pixels than the limit of 89,478,485 (--max-pixels)": 1,
    }
    limits = (6299, 6300)  # the good image has 6,300
    found = [run_main(main, "verify", tmp_path / "out", "--workers", 1, "--max-pixels", limit) for limit in limits]
    assert [done.status for done in found] == [3, 0]
    assert "bad-image  90x70 pixels, more than the limit of 6,299 (--max-pixels)" in found[0].stdout


def test_the_limit_on_pixels_is_a_number_that_makes_sense(tmp_path: Path) -> None:
    write_tree(tmp_path / "images", 3)
    done = run_main(main, "convert", tmp_path / "images", tmp_path / "out", "--max-pixels", 0)
    assert (done.status, done.stderr) == (2, "error: --max-pixels 0: at least 64 is needed\n")
