"""Finds what an earlier run of a conversion has left, and decides whether this run may continue from it.

While a split is converted, the folder `.NAME.convert` in the destination holds the plan, the listing of the source and a report
on each finished shard.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.json_file import as_object, get, parse_json
from pipelines.printable import counted
from pipelines.shards.find_tars import INFO_FILE
from tools.shards.build import ShardReport
from tools.shards.manifest import read_info, write_info
from tools.shards.plan import Plan
from tools.shards.storage import Storage, clear_temporary, write_text

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*-\d{6}\.tar")


def state_folder(name: str) -> str:
    """Returns the folder of the conversion of a split, relative to the destination."""
    return f".{name}.convert"


def report_name(plan: Plan, number: int) -> str:
    """Returns the file name of a shard's report, relative to the destination."""
    return f"{state_folder(plan.options.name)}/{number:06d}.json"


def find_complete(storage: Storage, name: str, record: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Returns the split's entry in `_info.json` if the same conversion was completed before, or else None.

    Raises:
        ValueError: The destination has the split from another conversion, or shards from elsewhere.
    """
    splits = read_info(storage).get("splits", {})
    listed = {tar for split in splits.values() for tar in split.get("filenames", ())}
    _refuse_other_names(storage, listed)
    if overwrite:
        return None
    way_out = "give another --name, or --overwrite"
    if name in splits:
        old = splits[name].get("conversion")
        if old is None:
            raise ValueError(f"{storage} already has a split {name!r}; {way_out}")
        if found := _differences(old, record):
            raise ValueError(f"{storage} already has a split {name!r} from another conversion: {found}; {way_out}")
        sizes = storage.sizes()
        tars = _listed_shards(splits[name], f"{storage}/{INFO_FILE}: split {name!r}")
        if broken := [tar for tar, size in tars if sizes.get(tar) != size]:
            raise ValueError(
                f"{storage}: {counted(len(broken), 'shard is', 'shards are')} missing or cut short, for example {broken[0]}; "
                "--overwrite writes all of them again"
            )
        return dict(splits[name])
    if not is_begun(storage, name) and _files(storage, name):
        raise ValueError(f"{storage} already has shards {name}-* that this command did not write; {way_out}")
    return None


def _listed_shards(split: dict[str, Any], place: str) -> list[tuple[str, int]]:
    """Returns name and size of the shards of a split, after checking the keys that a summary shows."""
    try:
        for key, kind in (("shard_lengths", "a list of whole numbers from 0"), ("image_bytes", "a whole number from 0")):
            get(split, key, kind, place)
        get(split, "changes", "an object of whole numbers from 0", place)
        sizes: list[int] = get(split, "shard_bytes", "a list of whole numbers from 0", place)
        if len(sizes) != len(split["filenames"]):
            raise ValueError(f"{place}: {len(split['filenames'])} 'filenames' and {len(sizes)} 'shard_bytes'")
        return list(zip(split["filenames"], sizes, strict=True))
    except ValueError as error:
        raise ValueError(f"{error}; --overwrite converts the split again") from error


def is_begun(storage: Storage, name: str) -> bool:
    """Returns whether an earlier run has left a plan."""
    return storage.read(f"{state_folder(name)}/plan.json") is not None


def begin(
    storage: Storage, plan: Plan, record: dict[str, Any], table: bytearray, overwrite: bool
) -> tuple[list[ShardReport], list[int]]:
    """Starts a conversion, or continues the one that an earlier run has left.

    Args:
        storage: The destination.
        plan: The conversion.
        record: The record of `Plan.describe`, which must equal the record of the earlier run.
        table: The table of `Plan.describe`, which tells how the source has changed.
        overwrite: Whether to start over if the earlier run was another conversion.

    Raises:
        ValueError: The options or the source differ from those of the earlier run, or there is too little space.

    Returns:
        The reports on the finished shards, and the numbers of the others.
    """
    name = plan.options.name
    state = state_folder(name)
    wanted: dict[str, Any] = {"record": record, "classes": list(plan.classes), "table": hashlib.sha256(table).hexdigest()}
    begun = _read_plan(storage, f"{state}/plan.json", overwrite)
    found = [] if begun is None else _changes(storage, state, begun, wanted, table)
    if begun is not None and not found:
        reports, pending = _finished(storage, plan)
        _check_space(storage, plan, pending, freed=0)
        return reports, pending
    if begun is not None and not overwrite:
        raise ValueError(
            f"{storage}: the conversion of split {name!r} was started differently: {'; '.join(found)}; "
            "restore what changed, or start over with --overwrite"
        )
    sizes = storage.sizes()
    _check_space(storage, plan, range(plan.num_shards), freed=sum(sizes[file] for file in _files(storage, name)))
    clear(storage, name)
    with storage.new_file(f"{state}/source.tsv") as path:
        path.write_bytes(table)
    write_text(storage, f"{state}/plan.json", json.dumps(wanted))
    return [], list(range(plan.num_shards))


def _read_plan(storage: Storage, name: str, overwrite: bool) -> dict[str, Any] | None:
    """Reads what an earlier run has planned. With `overwrite` a damaged file is no obstacle."""
    content, place = storage.read(name), f"{storage}/{name}"
    if content is None:
        return None
    try:
        begun = as_object(parse_json(content, place), place)
        for key, kind in (("record", "an object"), ("classes", "a list of texts"), ("table", "a text")):
            get(begun, key, kind, place)
        get(begun["record"], "source", "an object", place, default=None)
        return begun
    except ValueError as error:
        if overwrite:
            return None
        raise ValueError(f"{error}; --overwrite starts the conversion over") from error


def _changes(storage: Storage, state: str, begun: dict[str, Any], wanted: dict[str, Any], table: bytearray) -> list[str]:
    """Returns how a plan differs from the one that an earlier run has left. The list is empty if it does not."""
    found = _option_differences(begun["record"], wanted["record"])
    if begun["classes"] != wanted["classes"]:
        found.append("the classes changed")
    if begun["table"] != wanted["table"]:
        old = storage.read(f"{state}/source.tsv") or b""
        found.append(_source_differences(*(content.decode("utf-8", "backslashreplace") for content in (old, bytes(table)))))
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns how two conversions differ, in words. The text is empty if they do not."""
    found = _option_differences(old, new)
    before, after = (old.get("source") or {}).get("images", 0), new["source"]["images"]
    if before != after:
        found.append(f"the source had {counted(before, 'image')} and has {after:,}")
    elif _is_other_source(old, new):
        found.append("the images of the source have other sizes, names or classes")
    return "; ".join(found)


def _is_other_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    then = old.get("source") or {}
    return any(then.get(key) != new["source"][key] for key in ("images", "sha256"))


def _option_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the options that differ, in words.

    The options of the source are compared only if its images or classes differ, to name the reason.
    """

    def option(key: str) -> str:
        return key if key == "encoder" else f"--{key.replace('_', '-')}"

    def value(settings: Mapping[str, Any], key: str) -> str:
        return "not given" if settings.get(key) is None else str(settings[key])

    changed = [key for key in sorted({*old, *new} - {"source"}) if old.get(key) != new.get(key)]
    found = [f"{option(key)} was {value(old, key)} and is {value(new, key)}" for key in changed]
    before, after = (old.get("source") or {}).get("options"), new["source"]["options"]
    if _is_other_source(old, new) and isinstance(before, dict):  # older versions did not keep it
        keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        found += [f"{option(key)} was {value(before, key)} and is {value(after, key)}" for key in keys]
    return found


def _refuse_other_names(storage: Storage, listed: set[str]) -> None:
    strange = sorted(
        tar for tar in storage.sizes() if tar.endswith(".tar") and tar not in listed and not SHARD_NAME.fullmatch(tar)
    )
    if strange:
        raise ValueError(
            f"{storage} has {counted(len(strange), 'tar')} with names from another tool ({', '.join(strange[:3])}); "
            "two naming schemes in one folder would be read as one data set: name another folder"
        )


def _files(storage: Storage, name: str) -> list[str]:
    """Returns the shards and indices of a split, listed or not."""
    return [file for file in storage.sizes() if re.fullmatch(rf"{name}-\d{{6}}\.(tar|idx)", file)]


def clear(storage: Storage, name: str) -> None:
    """Deletes a split, complete or not."""
    info = read_info(storage)
    if info.get("splits", {}).pop(name, None):  # remove it from the list before its files
        write_info(storage, info)
    for file in storage.sizes(state_folder(name)):
        storage.delete(f"{state_folder(name)}/{file}")
    for file in _files(storage, name):
        storage.delete(file)


def _check_space(storage: Storage, plan: Plan, pending: Sequence[int], freed: int) -> None:
    """Raises ValueError if there is too little space for the pending shards, provided that their size is known."""
    shape, free = plan.options.shape, storage.free_bytes()
    if free is None or shape.resize is not None or shape.format != "keep":
        return
    needed = sum(plan.planned_bytes(number) for number in pending)
    if needed > free + freed:
        raise ValueError(f"{storage}: {needed / 1e6:,.0f} MB are needed and {(free + freed) / 1e6:,.0f} MB are free")


def _finished(storage: Storage, plan: Plan) -> tuple[list[ShardReport], list[int]]:
    """Returns the reports on shards whose report, tar and index exist, and the numbers of the other shards."""
    reports, pending = [], []
    sizes, written = storage.sizes(), storage.sizes(state_folder(plan.options.name))
    for number in range(plan.num_shards):
        name = plan.shard_name(number)
        files = (sizes.get(name), sizes.get(name.removesuffix(".tar") + ".idx"))
        report = _read_report(storage, report_name(plan, number)) if f"{number:06d}.json" in written else None
        if report is not None and report.file_bytes == files:
            reports.append(report)
        else:
            pending.append(number)
    clear_unfinished(storage, plan.options.name)
    return reports, pending


def _read_report(storage: Storage, name: str) -> ShardReport | None:
    """Reads the report on a shard. A shard whose report is damaged is built again."""
    content = storage.read(name)
    try:
        return None if content is None else ShardReport.from_json(content, f"{storage}/{name}")
    except ValueError:
        return None


def clear_unfinished(storage: Storage, name: str) -> None:
    """Deletes the unfinished shards, indices and reports of a split."""
    for folder in ("", state_folder(name)):
        clear_temporary(storage, rf"({name}-)?\d{{6}}\.(tar|idx|json)", folder)


def _source_differences(old: str, new: str) -> str:
    """Returns how two listings of a source differ, with examples of names."""
    then, now = ({line.rsplit("\t", 1)[0].split("\t", 2)[2]: line for line in text.split("\n") if line} for text in (old, new))
    kinds = {
        "missing": sorted(then.keys() - now.keys()),
        "new": sorted(now.keys() - then.keys()),
        "changed": sorted(name for name in then.keys() & now.keys() if then[name] != now[name]),
    }
    counts = [
        f"{len(names):,} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return f"the images of the source have changed: {', '.join(counts)}"
