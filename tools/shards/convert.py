"""`shards convert`: converts an image collection to the shards of one split."""

import collections
import contextlib
import json
import os
import time
from array import array
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.location import refuse_other_notations
from pipelines.printable import counted, printable
from pipelines.remote.object_store import is_url
from pipelines.shards.find_tars import INFO_FILE
from tools.shards.build import ShardReport, ShardTask, build_shard
from tools.shards.manifest import REJECTED_FILE, publish, read_info, read_rejected
from tools.shards.parallel import choose_workers, run, run_on_dask
from tools.shards.plan import Options, Plan, make_plan
from tools.shards.resume import begin, clear, clear_unfinished, find_complete, is_begun, report_name, state_folder
from tools.shards.sources.listing import Listing
from tools.shards.sources.recognize import SourceOptions, list_source
from tools.shards.sources.splits import require_one_split
from tools.shards.storage import LocalStorage, Storage, open_storage

TEXTS_SHOWN = 10  # reasons or changes in one line


@dataclass(frozen=True)
class Summary:
    """The result of a conversion.

    `seconds` and `num_built` (number of images read) refer to this run, and the other fields to the whole split. `rejected`
    counts the rejected images by reason, and `changes` the changed images by change.
    """

    split: str
    num_classes: int
    shard_lengths: tuple[int, ...]
    image_bytes: int
    seconds: float
    num_built: int
    rejected: dict[str, int]
    changes: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Returns one JSON object with the fields of this class."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        count, megabytes = sum(self.shard_lengths), self.image_bytes / 1e6
        images, classes = counted(count, "image"), counted(self.num_classes, "class", "classes")
        shards = counted(len(self.shard_lengths), "shard")
        lines = [f"{self.split}: {images} of {classes} in {shards}, {megabytes:,.1f} MB"]
        if not self.num_built:
            lines[0] += "; already complete, nothing to do"
        else:
            rate = self.num_built / self.seconds
            lines[0] += f", in {self.seconds:.1f} s ({rate:,.0f} images/s, {megabytes / max(count, 1) * rate:,.1f} MB/s)"
        if self.changes:
            lines.append(f"encoded: {_listed(self.changes)}")
        if self.rejected:
            files = counted(sum(self.rejected.values()), "file")
            lines.append(f"left out: {files} ({_listed(self.rejected)}); see {REJECTED_FILE}")
        return "\n".join([*lines, *(f"warning: {note}" for note in self.notes)])


def _listed(counts: Mapping[str, int]) -> str:
    """Returns the most frequent of these texts with their counts: a reason may name a label, and differ for each sample."""
    shown = sorted(collections.Counter(counts).most_common(TEXTS_SHOWN))
    more = [counted(len(counts) - len(shown), "other text")] if len(counts) > len(shown) else []
    return "; ".join([*(f"{number:,} {what}" for what, number in shown), *more])


def convert(
    source: str | Path,
    destination: str | Path,
    options: Options | None = None,
    *,
    source_options: SourceOptions | None = None,
    num_workers: int | None = None,
    scheduler: str | None = None,
    scratch: Path | None = None,
    overwrite: bool = False,
    strict: bool = False,
) -> Summary:
    """Writes `destination/NAME-000000.tar`, its index, and so on, and adds the split to `destination/_info.json`.

    The samples are shuffled over the whole set. Each shard appears under its name when it is complete, and the split appears in
    `_info.json` when all its shards are complete. The same call continues an interrupted conversion. The arguments are the
    options of `shards convert`; `scheduler` is --executor.

    Raises:
        ValueError: The arguments, the source or the destination cannot be used.
        RejectedError: An image was rejected, and `strict` is true.
    """
    started = time.perf_counter()
    options = options or Options()
    num_workers = choose_workers(num_workers)
    # Workers on other machines have another working directory.
    check_locations(str(source), str(destination))
    source, destination = os.path.abspath(source), str(destination)
    if not is_url(destination):
        destination = os.path.abspath(destination)
        _keep_apart(Path(source), Path(destination))
    source_options = source_options or SourceOptions()
    if source_options.kind == "auto" and source_options.labels is None:
        require_one_split(str(source), destination)
    storage = open_storage(destination)
    state = state_folder(options.name)
    if scratch is None and isinstance(storage, LocalStorage):
        scratch = storage.path / state / "unpacked"
    with storage.lock(state):
        listing = list_source(source, source_options, scratch, num_workers)
        plan = _plan(listing, read_info(storage), options, str(storage))
        record, table = plan.describe()
        record["source"]["options"] = source_options.record()
        pending: list[int] = []
        try:
            split = find_complete(storage, options.name, record, overwrite)
            if split is None:
                reports, pending = begin(storage, plan, record, table, overwrite)
        except ValueError:
            if not is_begun(storage, options.name):
                storage.delete_folder(state)  # it has only unpacked files
            raise
        if split is None:
            reports += _build(plan, storage, pending, num_workers, scheduler, strict)
            _require_images(storage, plan, reports)
            split = publish(storage, plan, record, sorted(reports, key=lambda report: report.name))
        storage.delete_folder(state)
    num_built = sum(map(plan.shard_length, pending))
    return _summary(storage, plan, split, num_built, time.perf_counter() - started)


def _summary(storage: Storage, plan: Plan, split: dict[str, Any], num_built: int, seconds: float) -> Summary:
    rejected = [entry for entry in read_rejected(storage) if entry["split"] == plan.options.name]
    return Summary(
        split=plan.options.name,
        num_classes=len(plan.classes),
        shard_lengths=tuple(split["shard_lengths"]),
        image_bytes=split["image_bytes"],
        seconds=seconds,
        num_built=num_built,
        rejected=dict(collections.Counter(entry["reason"] for entry in rejected)),
        changes=split["changes"],
        notes=(*plan.listing.notes, *_emptied_classes(plan, {entry["path"] for entry in rejected})),
    )


def _emptied_classes(plan: Plan, rejected: Set[str]) -> list[str]:
    """Returns a warning about classes of which all images were rejected, if there are any. They keep their number."""
    if not rejected:
        return []
    pairs = zip(plan.labels, plan.listing.extents.names, strict=True)
    left = set(plan.labels) - {label for label, name in pairs if name not in rejected}
    names = [plan.classes[label] for label in sorted(left)]
    classes = counted(len(names), "class, which keeps its number", "classes, which keep their numbers")
    return [f"no image is left of {classes}: {_some(names)}"] if names else []


def check_locations(source: str, destination: str) -> None:
    """Raises ValueError for what cannot be a source or a destination, whatever exists there."""
    for name, location in (("SRC", source), ("DST", destination)):
        if not location:
            raise ValueError(f"{name} is empty; name a folder, or . for the current one")
    if is_url(source):
        raise ValueError(f"{source}: images are read from local paths only; copy them to a local folder")
    for location in (source, destination):
        if not os.path.exists(location):
            refuse_other_notations(location)


def _keep_apart(source: Path, destination: Path) -> None:
    """Raises ValueError if one of source and destination holds the other."""
    inside, outside = source.resolve(), destination.resolve()
    nested = inside.parent == outside  # for a file or a pattern of files
    if inside.is_dir():
        nested = outside.is_relative_to(inside) or inside.is_relative_to(outside)
    if nested:
        raise ValueError(f"{destination} and the source {source} overlap; name another folder for the shards")


def _plan(listing: Listing, info: dict[str, Any], options: Options, destination: str) -> Plan:
    """Makes the plan with the class numbers of the data set, which its first split determines."""
    known = info.get("classes")
    if set(info.get("splits", {})) <= {options.name}:
        return make_plan(listing, listing.labels, listing.classes, options)
    if known is None:
        raise ValueError(f"{destination}/{INFO_FILE} lists splits but no classes; name another folder for this split")
    if list(listing.classes) == known or (listing.numbered and len(listing.classes) <= len(known)):
        return make_plan(listing, listing.labels, tuple(known), options)
    numbers = {name: number for number, name in enumerate(known)}
    if len(numbers) < len(known):
        raise ValueError(
            f"{destination}/{INFO_FILE} has several classes with the same name; label the new split by class number"
        )
    if not numbers.keys() >= set(listing.classes):
        raise ValueError(f"{listing.location}: {_class_differences(listing.classes, known, destination)}")
    labels = array("i", [numbers[listing.classes[label]] for label in listing.labels])
    return make_plan(listing, labels, tuple(known), options)


def _class_differences(mine: Sequence[str], known: Sequence[str], destination: str) -> str:
    """Returns which classes a new split and the data set do not share."""
    unknown = sorted(set(mine) - set(known))
    missing = sorted(set(known) - set(mine))
    text = f"the other splits in {destination} do not have {len(unknown)} of its classes: {_some(unknown)}"
    if missing:
        text += f"; it does not have {len(missing)} of theirs: {_some(missing)}"
    folded = {name.casefold(): name for name in known}
    if pairs := [f"{name} here and {folded[name.casefold()]} there" for name in unknown if name.casefold() in folded]:
        text += f"; only the case differs in {_some(pairs)}"
    return f"{text}; all splits of a data set share their classes"


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:20])) + (", ..." if len(names) > 20 else "")


def _require_images(storage: Storage, plan: Plan, reports: Sequence[ShardReport]) -> None:
    """Raises ValueError, and deletes the split, if every image was rejected."""
    if any(report.num_samples for report in reports):
        return
    clear(storage, plan.options.name)
    reasons = collections.Counter(reason for report in reports for _, reason in report.rejected)
    location, num_files = plan.listing.location, len(plan.listing.extents)
    raise ValueError(f"{location}: training can decode none of its {num_files:,} files ({_listed(reasons)})")


def _build(
    plan: Plan, storage: Storage, pending: Sequence[int], num_workers: int, scheduler: str | None, strict: bool
) -> list[ShardReport]:
    tasks = (
        ShardTask(
            plan.shard_name(number),
            tuple(plan.samples(number)),
            plan.options.shape,
            storage,
            report_name(plan, number),
            strict,
        )
        for number in pending
    )
    planned = {plan.shard_name(number): plan.shard_length(number) for number in pending}
    reports, num_bytes, started = [], 0, time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.callback(clear_unfinished, storage, plan.options.name)  # left by workers that were stopped or lost
        if scheduler is not None:
            results = run_on_dask(scheduler, build_shard, tasks)
        else:
            results = run(build_shard, tasks, max(1, min(num_workers, len(pending))))
        done = stack.enter_context(contextlib.closing(results))  # stops the workers
        # disable=None shows the bar on a terminal only.
        progress = stack.enter_context(tqdm(total=sum(planned.values()), unit="img", disable=None))
        for report in done:
            reports.append(report)
            num_bytes += report.image_bytes
            progress.set_postfix_str(f"{num_bytes / 1e6 / (time.perf_counter() - started):.1f} MB/s", refresh=False)
            progress.update(planned[report.name])
    return reports
