"""What an earlier run of a conversion has left, and whether this one may go on with it.

While a split is converted, `.NAME.convert` in the destination holds the plan, the source's listing and a report on each shard
that is finished.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tools.shards.build import ShardReport
from tools.shards.manifest import read_info, write_info
from tools.shards.plan import Plan
from tools.shards.storage import Storage, write_text

SHARD_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_]*)-\d{6}\.tar")


def report_name(plan: Plan, number: int) -> str:
    """The file of a shard's report, relative to the destination."""
    return f".{plan.options.name}.convert/{number:06d}.json"


def find_complete(storage: Storage, name: str, record: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The split's entry in `_info.json` where this very conversion was completed before; None where it is still to be done.

    Raises:
        ValueError: The destination has the split already, made otherwise, or shards from elsewhere.
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
            raise ValueError(f"{storage} has a split {name!r} already; {way_out}")
        if found := differences(old, record):
            raise ValueError(f"{storage} has a split {name!r} already, converted otherwise: {found}; {way_out}")
        sizes = storage.sizes()
        tars = zip(splits[name]["filenames"], splits[name]["shard_bytes"], strict=True)
        if broken := [tar for tar, size in tars if sizes.get(tar) != size]:
            raise ValueError(
                f"{storage}: {len(broken)} shards are missing or cut short, as {broken[0]}; --overwrite makes all anew"
            )
        return dict(splits[name])
    if not is_begun(storage, name) and _files(storage, name):
        raise ValueError(f"{storage} has shards called {name}-* already, from elsewhere; {way_out}")
    return None


def is_begun(storage: Storage, name: str) -> bool:
    """Whether an earlier run has left a plan."""
    return storage.read(f".{name}.convert/plan.json") is not None


def begin(
    storage: Storage, plan: Plan, record: dict[str, Any], table: bytearray, overwrite: bool
) -> tuple[list[ShardReport], list[int]]:
    """Takes up the conversion where an earlier run has left it, or begins it.

    Args:
        storage: The destination.
        plan: The conversion.
        record: What it has to have in common with the earlier run,
        table: and the source's table, which tells how it has not: see `Plan.describe`.
        overwrite: Begin anew where an earlier run was another one.

    Raises:
        ValueError: An earlier run had other options or another source; names the difference. Or there is too little space.

    Returns:
        The reports of the shards that are there, and the numbers of those that are not.
    """
    name = plan.options.name
    state = f".{name}.convert"
    wanted: dict[str, Any] = {"record": record, "classes": list(plan.classes), "table": hashlib.sha256(table).hexdigest()}
    text = storage.read(f"{state}/plan.json")
    begun: dict[str, Any] | None = json.loads(text) if text else None
    if begun == wanted:
        reports, pending = _finished(storage, plan)
        _check_space(storage, plan, pending, freed=0)
        return reports, pending
    if begun is not None and not overwrite:
        found = differences(begun["record"], wanted["record"])
        if begun["classes"] != wanted["classes"]:
            found += "; the classes are others"
        if begun["table"] != wanted["table"]:
            found += "; " + _source_differences(
                storage.read(f"{state}/source.tsv") or "", table.decode("utf-8", "backslashreplace")
            )
        raise ValueError(
            f"{storage}: the conversion of split {name!r} was begun otherwise: {found.removeprefix('; ')}; "
            "run it as it was begun, or --overwrite to begin anew"
        )
    sizes = storage.sizes()
    _check_space(storage, plan, range(plan.num_shards), freed=sum(sizes[file] for file in _files(storage, name)))
    clear(storage, name)
    with storage.new_file(f"{state}/source.tsv") as path:
        path.write_bytes(table)
    write_text(storage, f"{state}/plan.json", json.dumps(wanted))
    return [], list(range(plan.num_shards))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings differ, for people; empty where none does."""
    changed = [key for key in sorted({*old, *new} - {"source"}) if old.get(key) != new.get(key)]
    found = [f"{_option(key)} was {_value(old.get(key))} and is {_value(new.get(key))}" for key in changed]
    then, now = old.get("source", {}), new["source"]
    if then != now:
        found.append(
            f"the source had {then.get('images', 0):,} images and has {now['images']:,}, or their sizes or classes changed"
        )
    return "; ".join(found)


def _option(key: str) -> str:
    return key if key == "encoder" else f"--{key.replace('_', '-')}"


def _value(value: object) -> str:
    return "not given" if value is None else str(value)


def _refuse_other_names(storage: Storage, listed: set[str]) -> None:
    strange = sorted(
        tar for tar in storage.sizes() if tar.endswith(".tar") and tar not in listed and not SHARD_NAME.fullmatch(tar)
    )
    if strange:
        raise ValueError(
            f"{storage} has {len(strange)} tars named otherwise than by this command ({', '.join(strange[:3])}); "
            "two naming schemes in one folder would be read as one data set: name another folder"
        )


def _files(storage: Storage, name: str) -> list[str]:
    """The shards and indices of a split, listed or not."""
    return [file for file in storage.sizes() if re.fullmatch(rf"{name}-\d{{6}}\.(tar|idx)", file)]


def clear(storage: Storage, name: str) -> None:
    """Deletes a split, listed or begun."""
    info = read_info(storage)
    if info.get("splits", {}).pop(name, None):  # from here on it is not listed
        write_info(storage, info)
    for file in storage.sizes(f".{name}.convert"):
        storage.delete(f".{name}.convert/{file}")
    for file in _files(storage, name):
        storage.delete(file)


def _check_space(storage: Storage, plan: Plan, pending: Sequence[int], freed: int) -> None:
    """Raises ValueError where there is too little space for what is still to be built, as far as that is known."""
    shape, free = plan.options.shape, storage.free_bytes()
    if free is None or shape.resize is not None or shape.format != "keep":
        return
    needed = sum(plan.planned_bytes(number) for number in pending)
    if needed > free + freed:
        raise ValueError(f"{storage}: {needed / 1e6:,.0f} MB are needed and {(free + freed) / 1e6:,.0f} MB are free")


def _finished(storage: Storage, plan: Plan) -> tuple[list[ShardReport], list[int]]:
    """The shards of which report, tar and index are there."""
    reports, pending = [], []
    sizes, written = storage.sizes(), storage.sizes(f".{plan.options.name}.convert")
    for number in range(plan.num_shards):
        name = plan.shard_name(number)
        files = (sizes.get(name), sizes.get(name.removesuffix(".tar") + ".idx"))
        text = storage.read(report_name(plan, number)) if f"{number:06d}.json" in written else None
        report = ShardReport.from_json(text) if text else None
        if report is not None and report.file_bytes == files:
            reports.append(report)
        else:
            pending.append(number)
    clear_temporary(storage, plan.options.name)
    return reports, pending


def clear_temporary(storage: Storage, name: str) -> None:
    """Deletes what a run that failed or was killed had not finished writing."""
    for folder in ("", f".{name}.convert"):
        for file in storage.sizes(folder):
            if re.fullmatch(rf"\.({name}-)?\d{{6}}\.(tar|idx|json)\.[0-9a-f]{{8}}\.tmp", file):
                storage.delete(f"{folder}/{file}" if folder else file)


def _source_differences(old: str, new: str) -> str:
    """How two listings of a source differ, by names."""
    then, now = ({line.rsplit("\t", 1)[0].split("\t", 2)[2]: line for line in text.split("\n") if line} for text in (old, new))
    kinds = {
        "gone": sorted(then.keys() - now.keys()),
        "new": sorted(now.keys() - then.keys()),
        "changed": sorted(name for name in then.keys() & now.keys() if then[name] != now[name]),
    }
    told = [
        f"{len(names):,} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return f"of the source's images {', '.join(told)}"
