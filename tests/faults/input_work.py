"""Mutated tars and images in the code behind `convert`, `verify` and the loader. Runs in the children of `survive.Survivor`."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.printable import printable_text
from pipelines.shards.extents import Extents
from pipelines.shards.index import format_index, scan_tar, write_index
from pipelines.shards.labels import LabelReader
from pipelines.shards.shard_set import open_shards
from tests.faults.mutate import Member, Mutated, Original, make_image, make_original, mutate_image, mutate_tar
from tests.faults.survive import BATCH, Progress
from tests.helpers.runs import peak_megabytes
from tools.shards.build import ShardTask, build_shard
from tools.shards.plan import Options, make_plan
from tools.shards.sources.recognize import SourceOptions, list_source
from tools.shards.storage import LocalStorage
from tools.shards.verify_tar import Task, check_tar

SAMPLES = 6  # per tar
READER = LabelReader()


class Loaded(NamedTuple):
    """What a loader made of some tars: targets, images by target, and the offsets of bad samples by tar."""

    targets: list[int]
    images: dict[int, torch.Tensor]
    bad: dict[str, set[int]]


def originals(folder: str, count: int) -> list[Original]:
    """Returns tars of photographs, each with labels of its own, in two formats of tar."""
    images = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[: SAMPLES * count]]
    made = []
    for i in range(count):
        labels = [str(SAMPLES * i + k).encode() for k in range(SAMPLES)]
        part = [images[(SAMPLES * i + k) % len(images)] for k in range(SAMPLES)]
        made.append(make_original(part, labels, SAMPLES * i, 1 + i % 2))  # GNU and PAX
    return made


def tars(folder: str, arguments: str, seeds: Sequence[int], progress: str) -> None:
    """Mutates one tar for each seed."""
    tell, given = Progress(progress), json.loads(arguments)
    base = originals(given["images"], 8)
    for start in range(0, len(seeds), BATCH):
        batch = seeds[start : start + BATCH]
        place = Path(folder, "batch")
        (place / "shards").mkdir(parents=True)
        (place / "converted").mkdir()
        accepted: dict[str, int] = {}
        clean: set[str] = set()
        for seed in batch:
            tell.begin([seed], "index, convert and verify")
            original = base[seed % len(base)]
            _one_tar(place, seed, original, mutate_tar(original, seed), tell, accepted, clean)
        tell.begin(batch, "the loader")
        _load_all(place, accepted, clean, tell)
        tell.memory(peak_megabytes(), batch)
        shutil.rmtree(place)


def _one_tar(
    place: Path, seed: int, original: Original, mutated: Mutated, tell: Progress, accepted: dict[str, int], clean: set[str]
) -> None:
    tar = place / "shards" / f"t-{seed:09d}.tar"
    tar.write_bytes(mutated.content)
    try:
        samples = scan_tar(tar)
        write_index(tar.with_suffix(".idx"), samples)
        if samples:
            wrong = _wrong_labels(tar, original, mutated)
            tell.happened(seed, "indexed" if not wrong else "wrong label in the index", wrong)
            accepted[str(tar)] = seed
        else:
            tell.happened(seed, "indexed, without a sample")
            tar.unlink()
    except Exception as error:
        tell.happened(seed, *_refusal("index", error, mutated.how))
        tar.unlink()
    tar = place / f"{seed}.tar"
    tar.write_bytes(mutated.content)
    try:
        wrong = _convert(tar, place, seed, original, mutated)
        tell.happened(seed, "converted" if not wrong else "wrong label in a conversion", wrong)
    except Exception as error:
        tell.happened(seed, *_refusal("convert", error, mutated.how))
    try:
        findings = check_tar(Task(tar, None, READER, "decode")).findings
        tell.happened(seed, "verified: findings" if findings else "verified: none")
        if not findings:
            clean.add(f"{place}/shards/t-{seed:09d}.tar")
    except Exception as error:
        tell.happened(seed, *_refusal("verify", error, mutated.how))


def _refusal(stage: str, error: Exception, how: str) -> tuple[str, str]:
    """Returns the outcome of an exception, and what is wrong with it: a fault of the input is a ValueError of one line."""
    text = str(error)
    if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
        return f"{stage}: {type(error).__name__}", f"{how}: {text[:200]!r}"
    if "\n" in text:
        return f"{stage}: a message of several lines", f"{how}: {text[:200]!r}"
    if printable_text(text) != text:
        return f"{stage}: refused", ""  # commands print every message through `printable_text`
    return f"{stage}: refused", ""


def _wrong_labels(tar: Path, original: Original, mutated: Mutated) -> str:
    """Says which sample of an index has an image or a label of another one, although nobody touched its bytes."""
    shards = open_shards(str(tar), "valid")
    table = Extents(shards).of([0] * shards.num_samples, range(shards.num_samples))
    for offsets, sizes in zip(table.offsets.tolist(), table.sizes.tolist(), strict=True):
        if sizes[0] < 0:
            continue
        image, label = (mutated.content[start : start + size] for start, size in zip(offsets, sizes, strict=True))
        for jpg, cls in zip(original.members[::2], original.members[1::2], strict=True):
            whole = [mutated.is_original(offset, member) for offset, member in zip(offsets, (jpg, cls), strict=True)]
            if all(whole) and (image, READER.parse(label, "")) != (jpg.data, int(cls.data)):
                return f"{mutated.how}: {jpg.name} has the label {label!r}"
            if whole[0] and not whole[1] and _belongs_to_another(offsets[1], cls, original, mutated):
                return f"{mutated.how}: {jpg.name} has the label {label!r} of another sample"
    return ""


def _belongs_to_another(offset: int, cls: Member, original: Original, mutated: Mutated) -> bool:
    """Returns whether this is the label of another sample, and nobody touched either of them, as by turning one into a link."""
    for jpg, other in zip(original.members[::2], original.members[1::2], strict=True):
        if other is not cls and mutated.is_original(offset, other):
            return _is_kept(mutated, cls) and _is_kept(mutated, jpg)
    return False


def _convert(tar: Path, place: Path, seed: int, original: Original, mutated: Mutated) -> str:
    """Converts a tar to a shard, and says which of its samples got a wrong label."""
    listing = list_source(str(tar), SourceOptions(), None, 1)
    plan = make_plan(listing, listing.labels, listing.classes, Options())
    storage = LocalStorage(place / "converted")
    build_shard(ShardTask(f"t-{seed:09d}.tar", tuple(plan.samples(0)), plan.options.shape, storage, f"{seed:09d}.json"))
    labels = {image.data: label.data for image, label in zip(original.members[::2], original.members[1::2], strict=True)}
    names = {image.data: image.name for image in original.members[::2]}
    for i, extent in enumerate(listing.extents):  # type: ignore[arg-type, var-annotated]  # it has __getitem__ and __len__
        image = mutated.content[extent.offset : extent.offset + extent.size]
        got = listing.classes[listing.labels[i]].encode()
        member = next((m for m in original.members if m.data == image and m.name == names.get(image)), None)
        if member is None or not extent.name.endswith(member.name) or not mutated.is_original(extent.offset, member):
            continue
        label_member = original.members[original.members.index(member) + 1]
        if got != labels[image] and _is_kept(mutated, label_member):
            return f"{mutated.how}: {extent.name} has the label {got!r}"
    return ""


def _is_kept(mutated: Mutated, member: Member) -> bool:
    """Returns whether a member is still there, header and data."""
    shifts = {now - then for now, length, then in mutated.origin if then <= member.header < then + length}
    return any(mutated.is_original(member.offset + shift, member) for shift in shifts)


def _load_all(place: Path, accepted: dict[str, int], clean: set[str], tell: Progress) -> None:
    """Loads all tars that have an index, and all converted ones."""
    for folder, trusted in (("shards", clean), ("converted", None)):
        if not list((place / folder).glob("*.tar")):
            continue
        loaded = load(place / folder)
        for tar, bad in loaded.bad.items():
            seed = accepted.get(tar, int(Path(tar).stem[2:]))
            if trusted is None:
                tell.happened(seed, "convert let a bad sample pass", f"{len(bad)} samples of {Path(tar).name}")
            elif tar in trusted:
                tell.happened(seed, "verify let a bad sample pass", f"{len(bad)} samples of {Path(tar).name}")
            else:
                tell.happened(seed, "loaded: bad samples left out")


def load(folder: Path) -> Loaded:
    """Loads every sample of a folder of tars once, in order, on the CPU."""
    quarantine = folder / "quarantine.jsonl"
    config = DataConfig(train=f"{folder}/*.tar", valid=f"{folder}/*.tar", max_bad_fraction=1.0)
    spec = LoaderSpec(
        split="valid",
        batch_size=16,
        image_size=32,
        device=torch.device("cpu"),
        num_threads=1,
        num_classes=1000,
        quarantine=quarantine,
    )
    targets, images = [], {}
    with build_loader(config, spec) as loader:
        for batch in loader:
            for image, target in zip(batch["image"], batch["target"].tolist(), strict=True):
                targets.append(target)
                images[target] = image.clone()
    bad: dict[str, set[int]] = {}
    for line in quarantine.read_text().splitlines() if quarantine.exists() else ():
        entry = json.loads(line)
        bad.setdefault(entry["tar"], set()).add(entry["offset"])
    return Loaded(targets, images, bad)


def images(folder: str, arguments: str, seeds: Sequence[int], progress: str) -> None:
    """Mutates one image for each seed. Between two of them lies a good one, which must come out as ever."""
    tell, given = Progress(progress), json.loads(arguments)
    photos = [path.read_bytes() for path in sorted(Path(given["images"]).rglob("*.jpg"))[:40]]
    expected = _reference(Path(folder), photos)
    for start in range(0, len(seeds), BATCH):
        batch = seeds[start : start + BATCH]
        place = Path(folder, "batch")
        place.mkdir()
        made = [_mutated_image(photos, seed) for seed in batch]
        _one_batch_of_images(place, batch, made, photos, expected, tell)
        tell.memory(peak_megabytes(), batch)
        shutil.rmtree(place)


def _mutated_image(photos: list[bytes], seed: int) -> tuple[str, bytes, str]:
    import io

    with Image.open(io.BytesIO(photos[seed % len(photos)])) as picture:
        extension, encoded = make_image(picture, seed)
    mutated, how = mutate_image(encoded, seed)
    return extension, mutated, f"{extension}, {how}"


def _reference(folder: Path, photos: list[bytes]) -> dict[int, torch.Tensor]:
    (folder / "good").mkdir()
    write_samples(folder / "good" / "t-000000000.tar", [("jpg", photo, i) for i, photo in enumerate(photos)])
    return load(folder / "good").images


def write_samples(tar: Path, samples: list[tuple[str, bytes, int]]) -> None:
    """Writes a shard of images, given by extension, bytes and label, and its index."""
    import io
    import tarfile

    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for i, (extension, data, label) in enumerate(samples):
            for name, content in ((extension, data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{name}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    tar.with_suffix(".idx").write_text(format_index(scan_tar(tar)))


def _one_batch_of_images(
    place: Path,
    seeds: Sequence[int],
    made: list[tuple[str, bytes, str]],
    photos: list[bytes],
    expected: dict[int, torch.Tensor],
    tell: Progress,
) -> None:
    samples = []
    for i, (extension, data, _) in enumerate(made):
        samples += [("jpg", photos[i % len(photos)], i % len(photos)), (extension, data, 100 + i)]
    (place / "shards").mkdir()
    (place / "converted").mkdir()
    tar = place / "shards" / "t-000000000.tar"
    write_samples(tar, samples)
    tell.begin(seeds, "verify")
    findings = {finding.member for finding in check_tar(Task(tar, None, READER, "decode")).findings}
    tell.begin(seeds, "convert")
    listing = list_source(str(tar), SourceOptions(), None, 1)
    plan = make_plan(listing, listing.labels, listing.classes, Options(seed=seeds[0]))
    storage = LocalStorage(place / "converted")
    build_shard(ShardTask("t-000000000.tar", tuple(plan.samples(0)), plan.options.shape, storage, "0.json"))
    tell.begin(seeds, "the loader")
    loaded, again = load(place / "shards"), load(place / "converted")
    for target, image in [*loaded.images.items(), *again.images.items()]:
        if target in expected and not torch.equal(image, expected[target]):
            tell.happened(seeds[0], "a good image came out differently", f"label {target} beside seeds {list(seeds)}")
    for i, (seed, (extension, _, how)) in enumerate(zip(seeds, made, strict=True)):
        reported, target = f"{2 * i + 1:06d}.{extension}" in findings, 100 + i
        for outcome, wrong in _image_outcome(reported, target in loaded.images, target in again.images, how):
            tell.happened(seed, outcome, wrong)
    if again.bad:
        tell.happened(seeds[0], "convert let a bad sample pass", f"{again.bad} beside seeds {list(seeds)}")


def _image_outcome(reported: bool, loaded: bool, converted: bool, how: str) -> Iterator[tuple[str, str]]:
    if loaded:
        yield "loaded, though verify reports it" if reported else "loaded", ""
    else:
        yield ("left out by the loader", "") if reported else ("verify let a bad sample pass", how)
    yield ("converted" if converted else "rejected by convert"), ""


WORK: dict[str, Callable[..., None]] = {"tars": tars, "images": images}
