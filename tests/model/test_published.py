"""`--init-from torchvision`: which file is fetched, when, and what is said if it cannot be."""

import functools
import hashlib
import http.server
import json
import shutil
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing

import train
from model import published
from model.config import Arch
from model.distributed import alone
from model.factory import build_other, last_layers
from model.init_from import read_initial_weights
from model.published import is_published, published_weights
from tests.helpers.command import Done, run_main
from tests.helpers.faults import FaultyProxy
from tests.helpers.runs import arguments
from tests.helpers.torchvision_networks import fetch_resnet18, redirect, require_torchvision
from tests.model.test_init_from import ON, State, make_state
from tools.run.cli import parse

ALONE = alone(torch.device("cpu"))
URL = "https://download.pytorch.org/models/googlenet-1378be20.pth"
RESNET = Arch("torchvision.models:resnet18")
NONE = "--init-from torchvision: no weights with a checksum are published for"


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Site(NamedTuple):
    """A web server that publishes weights in place of torchvision's, through a proxy that can damage them."""

    proxy: FaultyProxy
    folder: Path

    def publish(self, network: str, state: State) -> str:
        """Publishes a state dict under a name with its checksum. Returns the URL."""
        torch.save(state, self.folder / "new")
        checksum = hashlib.sha256((self.folder / "new").read_bytes()).hexdigest()[:8]
        path = (self.folder / "new").rename(self.folder / f"{network}-{checksum}.pth")
        return f"{self.proxy.url}/{path.name}"

    @property
    def requests(self) -> list[str]:
        return [request.path for request in self.proxy.requests]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    handler = functools.partial(_Files, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with FaultyProxy(f"http://127.0.0.1:{server.server_port}") as proxy:
            yield Site(proxy, tmp_path / "site")
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch keeps weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def hide_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)


def refusal(arch: Arch = RESNET) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        published_weights(arch, ALONE)
    return str(refused.value)


def test_googlenet_is_fetched_once(
    site: Site,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO", "train")
    state = make_state()
    url = site.publish("googlenet", state)
    redirect("googlenet", url, monkeypatch)
    path = published_weights(Arch(), ALONE)
    assert [*cache.iterdir()] == [path] == [cache / url.rpartition("/")[2]]
    assert caplog.messages == [f"fetching {url}, which is kept as {path}"]
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal
    site.proxy.go_away()
    assert published_weights(Arch(), ALONE) == path
    assert len(site.requests) == len(caplog.messages) == 1
    initial = read_initial_weights(path)
    assert initial is not None
    assert initial.choose_transform_input(None)
    assert f"{caplog.messages[1]}\n" == ON
    assert initial.state.keys() == state.keys()  # also its auxiliary heads


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("flip", "RuntimeError: invalid hash value"),
        ("short", "RuntimeError: invalid hash value"),
        ("cut", "RuntimeError: invalid hash value"),
        ("reset", "ConnectionResetError: [Errno 104] Connection reset by peer"),
        ("403", "HTTPError: HTTP Error 403: Forbidden"),
        ("hang", "TimeoutError: timed out"),
    ],
)
def test_what_does_not_arrive_whole_is_not_kept(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, reason: str
) -> None:
    monkeypatch.setattr(published, "SECONDS", 5.0 if fault != "hang" else 0.3)
    url = site.publish("resnet18", {"fc.bias": torch.zeros(10_000)})
    redirect("resnet18", url, monkeypatch)
    site.proxy.fault = lambda *_: fault
    said, path = refusal(), cache / url.rpartition("/")[2]
    assert said.startswith(f"--init-from torchvision: not fetched ({reason}")
    assert said.endswith(f"; bring {url} to {path}, or anywhere and name it: --init-from {path.name}")
    assert [*cache.iterdir()] == []
    assert socket.getdefaulttimeout() is None
    site.proxy.fault = lambda *_: None
    assert published_weights(RESNET, ALONE) == path


def test_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_torchvision()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it has read the variable when an earlier test made it
    assert refusal(Arch()) == (
        "--init-from torchvision: not fetched (URLError: <urlopen error [Errno 111] Connection refused>); "
        f"bring {URL} to {cache}/googlenet-1378be20.pth, or anywhere and name it: --init-from googlenet-1378be20.pth"
    )
    assert [*cache.iterdir()] == []


def test_a_cache_that_cannot_be_written_to(cache: Path, tmp_path: Path) -> None:
    require_torchvision()
    (tmp_path / "torch").touch()
    assert f"(NotADirectoryError: [Errno 20] Not a directory: '{cache}'); bring https://" in refusal()


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_file_in_the_cache_is_verified(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, *, is_cut: bool) -> None:
    url = site.publish("resnet18", {"fc.bias": torch.zeros(3)})
    redirect("resnet18", url, monkeypatch)
    path = published_weights(RESNET, ALONE)
    content = path.read_bytes()
    path.write_bytes(content[:-1] if is_cut else b"x" + content[1:])
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert refusal() == (
        f"--init-from torchvision: {path} is damaged or another file: its SHA-256 begins with {found} instead of "
        f"{path.stem.rpartition('-')[2]}; remove it, and it is fetched again"
    )
    path.unlink()
    assert published_weights(RESNET, ALONE).read_bytes() == content
    assert len(site.requests) == 2


def test_googlenet_in_the_cache_needs_no_torchvision(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = site.publish("googlenet", {"fc.bias": torch.zeros(3)})
    monkeypatch.setattr(published, "GOOGLENET", url)
    hide_torchvision(monkeypatch)
    name = url.rpartition("/")[2]
    assert refusal(Arch()) == (
        "--init-from torchvision: torchvision is not installed; install it (docs/getting-started.md#torchvision), or "
        f"bring {url} to {cache}/{name}, or anywhere and name it: --init-from {name}"
    )
    cache.mkdir(parents=True)
    shutil.copy(site.folder / name, cache)
    assert published_weights(Arch(), ALONE) == cache / name
    assert site.requests == []


def test_a_torchvision_for_another_torch(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_torchvision(monkeypatch)
    monkeypatch.delitem(sys.modules, "torchvision")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = "torchvision cannot be imported (RuntimeError: operator torchvision::nms does not exist)"
    assert refusal(RESNET) == f"--init-from torchvision: {problem}; install it (docs/getting-started.md#torchvision)"
    assert refusal(Arch()).endswith(f", or anywhere and name it: --init-from {URL.rpartition('/')[2]}")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("net.py:build", "--init-from torchvision is for networks of torchvision, and net.py:build is none; name a file"),
        ("timm:vit", "--init-from torchvision is for networks of torchvision, and timm:vit is none; name a file"),
        ("torchvision.models:ResNet", f"{NONE} torchvision.models:ResNet; name a file"),
        ("torchvision.models.quantization:resnet18", f"{NONE} torchvision.models.quantization:resnet18; name a file"),
        ("torchvision.models:resnet1", "torchvision.models:resnet1: torchvision.models has no function resnet1; did you mean"),
    ],
)
def test_networks_without_weights(factory: str, message: str) -> None:
    if factory.startswith("torchvision"):
        require_torchvision()
    assert refusal(Arch(factory)).startswith(message)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torchvision").mkdir()  # such as the package's sources
    assert is_published(Path("torchvision"))
    (tmp_path / "torchvision").rmdir()
    assert is_published(Path("torchvision"))
    (tmp_path / "torchvision").touch()
    assert not is_published(Path("torchvision"))
    assert not is_published(Path("other.pth"))
    assert not is_published(None)


@pytest.mark.parametrize("are_ranks", [False, True])
def test_two_processes_at_once(site: Site, cache: Path, tmp_path: Path, *, are_ranks: bool) -> None:
    """Two ranks fetch the file once. Two runs may both fetch it, and neither disturbs the other."""
    url = site.publish("resnet18", {"fc.bias": torch.zeros(1_000_000)})
    site.proxy.latency = 1.0  # so that a process that does not wait comes too early
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1] if are_ranks else 0
    torch.multiprocessing.spawn(fetch_resnet18, (url, port, tmp_path), nprocs=2)
    assert len(site.requests) == 1 or not are_ranks
    (path,) = cache.iterdir()
    copies = [tmp_path / f"{rank}.pth" for rank in range(2)]
    assert {copy.read_bytes() for copy in (path, *copies)} == {(site.folder / path.name).read_bytes()}


def as_published(network: str, state: State) -> State:
    """Returns a state dict in the form that torchvision publishes: some files are older than the counters."""
    if network == "densenet121":
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            old = f"{layer[:-1]}.{layer[-1]}"
            state = {name.replace(f".{layer}.", f".{old}.") if "denselayer" in name else name: state[name] for name in state}
    is_old = network != "mnasnet0_5"
    return {name: value for name, value in state.items() if not (is_old and name.endswith(".num_batches_tracked"))}


@pytest.mark.parametrize("network", ["densenet121", "mnasnet0_5"])
def test_old_and_odd_files(network: str, tmp_path: Path) -> None:
    """DenseNet's has old names and no counters of batches, and MNASNet asks for the version of its layers."""
    require_torchvision()
    arch, path = Arch(f"torchvision.models:{network}"), tmp_path / "weights.pth"
    theirs, ours = build_other(arch, 1000), build_other(arch, 3)
    torch.save(as_published(network, dict(theirs.state_dict())), path)
    initial = read_initial_weights(path, arch=arch)
    assert initial is not None
    initial(ours, None, last_layers(ours, 3))
    state = ours.state_dict()
    differ = {name for name, value in theirs.state_dict().items() if not torch.equal(value, state[name])}
    assert differ == {f"{layer}.{kind}" for layer in last_layers(ours, 3) for kind in ("weight", "bias")}


def run(*words: str) -> Done:
    def main(words: Any) -> None:
        train.main(words)
        sys.exit(0)

    return run_main(main, *words)


def test_fine_tuning_from_beginning_to_end(
    site: Site, shards: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run resumes without the network and without the file, and its config.json repeats it."""
    require_torchvision()
    state = as_published("resnet18", build_other(RESNET, 1000).state_dict())
    redirect("resnet18", site.publish("resnet18", state), monkeypatch)
    folder = tmp_path / "run"
    words = arguments(shards, folder, "--epochs", 1, "--batch-size", 30, "--model.arch", RESNET.factory)
    words += ["--init-from", "torchvision", "--checkpoint.every-steps", "1"]
    done = run(*words)
    assert done.status == 0, done.stderr
    path = next(cache.iterdir())
    assert f"loaded 100 of 122 tensors from {path}\n" in done.stdout
    assert "the file has 1000 classes, and the data 3: the last layers are reset: fc\n" in done.stdout
    assert json.loads((folder / "config.json").read_text())["init_from"] == "torchvision"
    assert parse(["--config", str(folder / "config.json"), "--run-dir", "b"]).init_from == Path("torchvision")

    site.proxy.go_away()
    shutil.rmtree(cache)
    max((folder / "checkpoints").iterdir()).unlink()
    done = run(*words)
    assert done.status == 0, done.stderr
    assert "resuming after step 1\n" in done.stdout
    assert not cache.exists()
