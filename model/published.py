"""Weights that torchvision publishes: `--init-from torchvision` takes them from torch's cache, or fetches them into it."""

import hashlib
import http.client
import importlib
import importlib.util
import logging
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import torch

from model.config import Arch
from model.distributed import World
from model.factory import find_factory, one_line

log = logging.getLogger("train")

NAME = Path("torchvision")  # of these weights, as --init-from has it
GOOGLENET = "https://download.pytorch.org/models/googlenet-1378be20.pth"  # as torchvision has it
INSTALLATION = "docs/getting-started.md#torchvision"
SECONDS = 20.0  # that a server may take to answer, or to send more


def is_published(path: Path | None) -> bool:
    """Returns whether `--init-from` names torchvision's weights. A file of that name comes first."""
    return path == NAME and not NAME.is_file()


def published_weights(arch: Arch, world: World) -> Path:
    """Returns the file with torchvision's weights for a network. All ranks call this; one of each machine fetches the file.

    Raises:
        ValueError: There are no such weights, the file cannot be fetched, or its checksum is not the one in its name.
    """
    url, checksum = _default_weights(arch)
    path = _kept(url)
    if world.local_rank == 0:
        if not path.exists():
            _fetch(url, path, checksum)
        _verify(path, checksum)
    world.barrier()
    return path


def _default_weights(arch: Arch) -> tuple[str, str]:
    """Returns the URL of a network's weights, and the beginning of their SHA-256, which is in their name.

    GoogLeNet's need no torchvision if they have been brought to the cache.
    """
    if arch.factory and arch.factory.split(".")[0] != "torchvision":
        raise ValueError(f"--init-from torchvision is for networks of torchvision, and {arch} is none; name a file")
    if not arch.factory and _kept(GOOGLENET).exists():
        url = GOOGLENET
    else:
        models = _import_torchvision(arch)
        factory = find_factory(arch.factory) if arch.factory else models.googlenet
        try:
            url = models.get_model_weights(factory).DEFAULT.url
        except (ValueError, AttributeError):  # it takes no weights
            url = ""
    found = re.search(r"-([0-9a-f]{8,})\.", url)
    if not found:
        raise ValueError(f"--init-from torchvision: no weights with a checksum are published for {arch}; name a file")
    return url, found[1]


def _import_torchvision(arch: Arch) -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except Exception as error:  # anything: beside another torch than its own, a build of torchvision raises a RuntimeError
        is_there = importlib.util.find_spec("torchvision") is not None
        problem = f"cannot be imported ({one_line(error)})" if is_there else "is not installed"
        other_way = "" if arch.factory else f", or {_bring(GOOGLENET)}"
        raise ValueError(f"--init-from torchvision: torchvision {problem}; install it ({INSTALLATION}){other_way}") from error


def _kept(url: str) -> Path:
    """Returns where torch's cache keeps a file."""
    return Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlsplit(url).path).name)


def _bring(url: str) -> str:
    path = _kept(url)
    return f"bring {url} to {path}, or anywhere and name it: --init-from {path.name}"


def _fetch(url: str, path: Path, checksum: str) -> None:
    log.info("fetching %s, which is kept as %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(SECONDS):
            torch.hub.download_url_to_file(url, str(path), checksum, progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: of the checksum
        if isinstance(error, HTTPError):
            error.close()
        raise ValueError(f"--init-from torchvision: not fetched ({one_line(error)}); {_bring(url)}") from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Limits the waits of new sockets. torch's download has no option for it, and would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _verify(path: Path, checksum: str) -> None:
    """Raises a `ValueError` if a file has another checksum. torch verifies one only while it fetches the file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not (found := digest.hexdigest()).startswith(checksum):
        raise ValueError(
            f"--init-from torchvision: {path} is damaged or another file: its SHA-256 begins with {found[: len(checksum)]} "
            f"instead of {checksum}; remove it, and it is fetched again"
        )
