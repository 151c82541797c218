"""Checkpoints that run code where somebody unpickles them, each in another way, and tars that reach out of their folder."""

import collections
import functools
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class WithState(dict[str, Any]):
    """A dict whose pickle sets attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (collections.OrderedDict, (), {"__class__": Reduced(os.system, (self["command"],))})


def archive(content: bytes, *more: tuple[str, bytes], folder: str = "archive", compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns an archive as torch.save writes it, with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n"), *more):
            file.writestr(f"{folder}/{name}", data)
    return out.getvalue()


def _saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def _within_a_tensor(command: str) -> bytes:
    """A tensor whose storage is what a call returns."""
    offset: Any = Reduced(os.system, (command,))
    rebuilt = Reduced(torch._utils._rebuild_tensor_v2, (torch.UntypedStorage(4), offset, (1,), (1,), False, {}))
    return _saved({"model": {"fc.weight": rebuilt}})


def _opcodes(command: str) -> dict[str, bytes]:
    line = command.encode()
    return {
        "GLOBAL and REDUCE": b"cos\nsystem\n(V" + line + b"\ntR.",
        "INST": b"(V" + line + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + line + b"\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93(V" + line + b"\ntR.",
        "STACK_GLOBAL from the memo": b"\x80\x04\x8c\x02os\x940\x8c\x06system\x940h\x00h\x01\x93(V" + line + b"\ntR.",
        "posix, not os": b"cposix\nsystem\n(V" + line + b"\ntR.",
        "a name with dots": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93(V" + line + b"\ntR.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(](V/bin/sh\nV-c\nV" + line + b"\nelt}\x92.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}(V__setstate__\ncos\nsystem\nubV" + line + b"\nb.",
        "a second pickle behind the first": b"}.cos\nsystem\n(V" + line + b"\ntR.",
        "EXT1": b"\x80\x02\x82\x01(V" + line + b"\ntR.",
        "a persistent ID that is called": b"\x80\x02cos\nsystem\n(V" + line + b"\ntRQ.",
    }


def hostile_checkpoints(marker: Path) -> dict[str, bytes]:
    """Returns files by what they do. Each creates the marker if its code runs."""
    command = f"touch '{marker}'"
    call = Reduced(os.system, (command,))
    program = f"open({str(marker)!r}, 'w')"
    reduced = {
        "os.system": call,
        "builtins.exec": Reduced(exec, (program,)),
        "builtins.eval": Reduced(eval, (program,)),
        "subprocess.Popen": Reduced(subprocess.Popen, (["touch", str(marker)],)),
        "open for writing": Reduced(open, (str(marker), "w")),
        "functools.partial": Reduced(functools.partial(os.system, command), ()),
        "getattr of builtins": Reduced(getattr, (Reduced(__import__, ("os",)), "system")),
        "a nested pickle": Reduced(pickle.loads, (pickle.dumps(call),)),
        "torch.load within": Reduced(torch.storage._load_from_bytes, (pickle.dumps(call),)),
        "state of an OrderedDict": WithState(command=command),
        "in a list in a dict": {"model": {"a": [1, (2, {"b": call})]}},
        "as a key": {Reduced(os.system, (command,)): 1},
        "an iterator of items": Reduced(collections.OrderedDict, (), None, None, iter([("a", call)])),
    }
    files = {f"torch.save, {name}": _saved(value) for name, value in reduced.items()}
    files |= {f"torch's old format, {n}": _saved(v, _use_new_zipfile_serialization=False) for n, v in reduced.items()}
    files |= {f"protocol {number}": pickle.dumps({"model": call}, number) for number in range(pickle.HIGHEST_PROTOCOL + 1)}
    files["an offset of a tensor"] = _within_a_tensor(command)
    for name, content in _opcodes(command).items():
        files |= {f"archive, {name}": archive(content), f"bare, {name}": content}
    evil, good = pickle.dumps(call, 2), pickle.dumps({"model": {}}, 2)
    files["two of data.pkl"] = _twice(good, evil)
    files["compressed"] = archive(evil, compression=zipfile.ZIP_DEFLATED)
    files["in another folder"] = archive(good, ("../archive/data.pkl", evil))
    files["TorchScript"] = archive(evil, ("constants.pkl", evil), ("code/__torch__.py", program.encode()))
    files["a tar, torch's first format"] = _old_tar(evil)
    files["behind other bytes"] = b"\0" * 100 + archive(evil)
    files["in data.pkl of any case"] = archive(good, ("DATA.PKL", evil), ("data.PKL", evil))
    return files


def _twice(first: bytes, second: bytes) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of the second
        return archive(first, ("data.pkl", second))


def _old_tar(evil: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(evil)
            tar.addfile(member, io.BytesIO(evil))
    return out.getvalue()


MEMBERS: dict[str, Callable[[tarfile.TarInfo], None]] = {
    "../../outside/x.jpg": lambda member: None,
    "/tmp/googlenet-dali-faults/x.jpg": lambda member: None,
    "..": lambda member: None,
    "link.jpg": lambda member: (setattr(member, "type", tarfile.SYMTYPE), setattr(member, "linkname", "/etc/passwd"), None)[2],
    "hard.jpg": lambda member: (setattr(member, "type", tarfile.LNKTYPE), setattr(member, "linkname", "/etc/passwd"), None)[2],
    "up.jpg": lambda member: (setattr(member, "type", tarfile.SYMTYPE), setattr(member, "linkname", "../../outside"), None)[2],
    "fifo.jpg": lambda member: setattr(member, "type", tarfile.FIFOTYPE),
    "device.jpg": lambda member: (setattr(member, "type", tarfile.CHRTYPE), setattr(member, "devmajor", 1), None)[2],
    "disk.jpg": lambda member: setattr(member, "type", tarfile.BLKTYPE),
    "folder.jpg": lambda member: setattr(member, "type", tarfile.DIRTYPE),
    "~/x.jpg": lambda member: None,
    "$HOME/x.jpg": lambda member: None,
    "`touch x`.jpg": lambda member: None,
}


def hostile_tar(image: bytes, prefix: str = "") -> bytes:
    """Returns a tar with a member of each kind, and a label beside each, between two good samples."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.jpg", *MEMBERS, "z.jpg"):
            for path, data in ((name, image), (name.rpartition(".jpg")[0] + ".cls", b"0")):
                member = tarfile.TarInfo(prefix + path)
                if path.endswith(".jpg"):
                    MEMBERS.get(name, lambda member: None)(member)
                member.size = len(data) if member.isreg() else 0
                tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return out.getvalue()
