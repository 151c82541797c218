"""Valid contents of each kind of file, from which mutations start."""

import io
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from model.checkpoint import save_checkpoint
from pipelines.shards.index import format_index, group_samples, iter_components
from tests.faults.mutate import make_original


def _tars() -> list[bytes]:
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    tars = [
        make_original([b"\xff\xd8 one \xff\xd9", b"\xff\xd8 two \xff\xd9"], [b"0", b"1"], 0, form).content for form in forms
    ]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a/" + "long" * 40 + ".jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (
                (tarfile.REGTYPE, "") if "a/" in name else (tarfile.LNKTYPE, "a/" + "long" * 40 + ".jpg")
            )
            tar.addfile(member)
    return [*tars, out.getvalue()]


def _indices() -> list[bytes]:
    return [format_index(group_samples(iter_components(io.BytesIO(tar), "x"))).encode() for tar in _tars()]


def _infos() -> list[bytes]:
    split = b'{"filenames": ["train-000000.tar"], "shard_lengths": [2], "num_samples": 2}'
    return [b"{}", b'{"classes": ["ant", "bee"], "splits": {"train": ' + split + b"}}", b'\xef\xbb\xbf{"splits": {}}']


def _checkpoints() -> list[bytes]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.pt")
        save_checkpoint(path, {"step": 3, "weights": torch.arange(6.0), "classes": ["ant"], "nested": {"a": [1, (2.5, None)]}})
        return [path.read_bytes()]


def _labels() -> list[bytes]:
    return [
        b"7",
        b"ant",
        b"10",
        b"1.0",
        b"\xef\xbb\xbf0\r\n",
        b"1\0\0\0",
        b'{"a": {"b": 1}}',
        b'{"a": {"b": "bee"}}',
        b"\x01\0\0\0",
    ]


def examples(name: str) -> list[bytes]:
    """Returns valid contents for a property, by its name."""
    return {"tar": _tars, "index": _indices, "info": _infos, "checkpoint": _checkpoints, "label": _labels}[name]()
