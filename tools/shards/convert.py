"""`shards convert`: an image collection becomes the shards of one split."""

import collections
import contextlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.remote.object_store import is_url
from pipelines.shards.shard_set import INFO_FILE
from tools.shards import parallel
from tools.shards.build import ShardReport, ShardTask, build_shard
from tools.shards.cluster import dask_results
from tools.shards.manifest import REJECTED_FILE, publish, read_info, read_rejected
from tools.shards.plan import Options, Plan, make_plan
from tools.shards.resume import begin, clear, clear_temporary, find_complete, is_begun, report_name
from tools.shards.sources import Listing, SourceOptions, open_source
from tools.shards.storage import LocalStorage, Storage, open_storage


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes:
        split: Its name.
        num_classes: Classes of the data set.
        shard_lengths: Samples in each shard.
        image_bytes: Of all images as they are stored.
        seconds: This run took.
        num_built: Images that this run read; the others were there from an earlier one.
        rejected: Images left out, by reason.
        changes: Images that are not stored as they were, by what was done to them.
        notes: What the user should know.
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
        """One JSON object with the fields of this class."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        count, megabytes = sum(self.shard_lengths), self.image_bytes / 1e6
        shards = f"{len(self.shard_lengths)} shard{'s' if len(self.shard_lengths) > 1 else ''}"
        lines = [f"{self.split}: {count:,} images of {self.num_classes} classes in {shards}, {megabytes:,.1f} MB"]
        if not self.num_built:
            lines[0] += "; complete already, nothing to do"
        else:
            rate = self.num_built / self.seconds
            lines[0] += f", in {self.seconds:.1f} s ({rate:,.0f} images/s, {megabytes / max(count, 1) * rate:,.1f} MB/s)"
        if self.changes:
            lines.append(f"encoded: {_counts(self.changes)}")
        if self.rejected:
            lines.append(f"left out: {sum(self.rejected.values()):,} files ({_counts(self.rejected)}); see {REJECTED_FILE}")
        return "\n".join([*lines, *(f"warning: {note}" for note in self.notes)])


def _count(reasons: Iterable[str]) -> dict[str, int]:
    return dict(collections.Counter(reasons))


def _counts(counts: dict[str, int]) -> str:
    return "; ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))


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
    """Writes `destination/NAME-000000.tar`, its index, and so on, and enters the split in `destination/_info.json`.

    Samples are shuffled over the whole set. A shard appears under its name once it is complete, and the split in `_info.json`
    once all of its shards are. A conversion that was interrupted is taken up by the same call.

    Args:
        source: See `tools.shards.sources.open_source`.
        destination: Folder of the data set or URL of a prefix in an object store; made where it is not there.
        options: What decides the bytes.
        source_options: How to read the source.
        num_workers: Processes of this machine; one a CPU by default.
        scheduler: Address of a Dask scheduler whose workers build the shards instead.
        scratch: Folder for what has to be unpacked; by default in the destination.
        overwrite: Replace a split of that name.
        strict: Stop at the first image that is rejected.

    Raises:
        ValueError: The arguments, the source or the destination cannot be used as they are; says what to change.
        RejectedError: With `strict`.
    """
    started = time.perf_counter()
    options, source_options = options or Options(), source_options or SourceOptions()
    num_workers = parallel.check_workers(num_workers) or parallel.num_cpus()
    # Workers elsewhere, as those of Dask, have another current folder.
    source, destination = os.path.abspath(source), _absolute(str(destination))
    _keep_apart(source, destination)
    storage = open_storage(destination)
    state = f".{options.name}.convert"
    if scratch is None and isinstance(storage, LocalStorage):
        scratch = storage.path / state / "unpacked"
    with storage.lock(state):
        listing = open_source(source, source_options, scratch, num_workers).listing()
        plan = _plan(listing, read_info(storage), options, str(storage))
        record, table = plan.describe()
        pending: list[int] = []
        try:
            split = find_complete(storage, options.name, record, overwrite)
            if split is None:
                reports, pending = begin(storage, plan, record, table, overwrite)
        except ValueError:
            if not is_begun(storage, options.name):
                storage.delete_folder(state)  # what was unpacked
            raise
        if split is None:
            reports += _build(plan, storage, pending, num_workers, scheduler, strict)
            _require_images(storage, plan, reports)
            split = publish(storage, plan, record, sorted(reports, key=lambda report: report.name))
        storage.delete_folder(state)
    return Summary(
        split=options.name,
        num_classes=len(plan.classes),
        shard_lengths=tuple(split["shard_lengths"]),
        image_bytes=split["image_bytes"],
        seconds=time.perf_counter() - started,
        num_built=sum(plan.bounds[number + 1] - plan.bounds[number] for number in pending),
        rejected=_count(entry["reason"] for entry in read_rejected(storage) if entry["split"] == options.name),
        changes=split["changes"],
        notes=tuple(listing.notes),
    )


def _absolute(location: str) -> str:
    return location if is_url(location) else os.path.abspath(location)


def _keep_apart(source: str, destination: str) -> None:
    """Raises ValueError where the shards would land among the images, or the other way round."""
    if is_url(destination):
        return
    inside, outside = Path(source).resolve(), Path(destination).resolve()
    if not inside.exists():  # a pattern of files
        nested = inside.parent == outside
    elif inside.is_dir():
        nested = outside.is_relative_to(inside) or inside.is_relative_to(outside)
    else:
        nested = inside.parent == outside
    if nested:
        raise ValueError(f"{destination} and the source {source} lie within one another; name a folder outside of it")


def _plan(listing: Listing, info: dict[str, Any], options: Options, destination: str) -> Plan:
    """The plan, with the class numbers of the data set: those of the first split, which later ones have to share."""
    known = info.get("classes")
    if set(info.get("splits", {})) <= {options.name}:
        return make_plan(listing, listing.labels, listing.classes, options)
    if known is None:
        raise ValueError(f"{destination}/{INFO_FILE} lists splits and no classes, so a new split cannot be numbered like them")
    if list(listing.classes) == known or (listing.numbered and len(listing.classes) <= len(known)):
        return make_plan(listing, listing.labels, tuple(known), options)
    numbers = {name: number for number, name in enumerate(known)}
    if len(numbers) < len(known):
        raise ValueError(
            f"{destination}/{INFO_FILE} has several classes of one name; a split can be numbered like them by numbers only"
        )
    unknown = [name for name in listing.classes if name not in numbers]
    if unknown:
        raise ValueError(
            f"{listing.location}: {len(unknown)} classes that the other splits in {destination} do not have: "
            f"{', '.join(unknown[:20])}{', ...' if len(unknown) > 20 else ''}; all splits of a data set share their classes"
        )
    labels = array("i", [numbers[listing.classes[label]] for label in listing.labels])
    return make_plan(listing, labels, tuple(known), options)


def _require_images(storage: Storage, plan: Plan, reports: Sequence[ShardReport]) -> None:
    """Raises ValueError, and leaves nothing behind, where every image was rejected."""
    if any(report.num_samples for report in reports):
        return
    clear(storage, plan.options.name)
    reasons = _counts(_count(reason for report in reports for _, reason in report.rejected))
    location, num_files = plan.listing.location, len(plan.listing.extents)
    raise ValueError(f"{location}: none of its {num_files:,} files is an image that training could decode ({reasons})")


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
    planned = {plan.shard_name(number): plan.bounds[number + 1] - plan.bounds[number] for number in pending}
    reports, num_bytes, started = [], 0, time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.callback(clear_temporary, storage, plan.options.name)  # what workers that were stopped or lost have left
        if scheduler is not None:
            done = stack.enter_context(dask_results(scheduler, build_shard, tasks))
        else:
            done = parallel.run(build_shard, tasks, max(1, min(num_workers, len(pending))))
        # None: only where there is a terminal
        progress = stack.enter_context(tqdm(total=sum(planned.values()), unit="img", disable=None))
        for report in done:
            reports.append(report)
            num_bytes += report.image_bytes
            progress.set_postfix_str(f"{num_bytes / 1e6 / (time.perf_counter() - started):.1f} MB/s", refresh=False)
            progress.update(planned[report.name])
    return reports
