"""The tar writer, compared with the standard library, and the memory that planning takes."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

from tools.shards.write import BUFFER_BYTES, ShardWriter


def test_the_bytes_are_those_of_tarfile(tmp_path: Path) -> None:
    """The images have all kinds of sizes, and some are larger than the writer's buffer."""
    expected = io.BytesIO()
    sizes = [0, 1, 511, 512, 513, 70_000, BUFFER_BYTES - 2048, BUFFER_BYTES + 1, 3, 2 * BUFFER_BYTES, 100]
    with (
        tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ShardWriter(tmp_path / "x.tar") as writer,
    ):
        for number, size in enumerate(sizes):
            key, image, label = f"{number:08d}_{'k' * 7 * number}", bytes([number]) * size, str(number * 111).encode()
            for name, data in ((f"{key}.jpg", image), (f"{key}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

            def read(into: memoryview, image: bytes = image) -> None:
                into[:] = image

            writer.add(key, "jpg", size, read, label)
    assert (tmp_path / "x.tar").read_bytes() == expected.getvalue()
    assert writer.num_bytes == len(expected.getvalue())
    for sample in writer.samples:
        for component in sample:
            with tarfile.open(tmp_path / "x.tar") as tar:
                member = tar.getmember(component.name)
            assert (component.offset, component.size) == (member.offset_data, member.size)


def test_unreadable_images_leave_no_trace(tmp_path: Path) -> None:
    def fail(into: memoryview) -> None:
        into[:2] = b"xx"
        raise PermissionError

    with ShardWriter(tmp_path / "x.tar") as writer:
        try:
            writer.add("a", "jpg", 700, fail, b"1")
        except PermissionError:
            writer.add("b", "jpg", 1, lambda into: None, b"2")
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert [member.name for member in tar] == ["b.jpg", "b.cls"]


def test_planning_takes_little_memory() -> None:
    command = [sys.executable, "-m", "tools.bench.plan", "--images", "200000", "--json"]
    cost = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert cost["images"] == 200_000
    assert cost["shards"] == 200
    assert cost["peak_memory_bytes"] < 600e6 / 1_281_167 * 200_000 + 40e6  # of the interpreter
