"""The files that describe a data set: `_info.json` and `rejected.jsonl`."""

import collections
import json
from collections.abc import Sequence
from typing import Any

from pipelines.json_file import as_object, get, parse_json_lines
from pipelines.printable import counted
from pipelines.shards.find_tars import INFO_FILE, parse_info
from tools.shards.build import ShardReport
from tools.shards.plan import Plan
from tools.shards.storage import Storage, clear_temporary, write_text

REJECTED_FILE = "rejected.jsonl"


def read_info(storage: Storage) -> dict[str, Any]:
    """Reads the `_info.json` of a data set, or returns an empty dict if there is none.

    Raises:
        ValueError: The file cannot be used; see `parse_info`.
    """
    content = storage.read(INFO_FILE)
    return {} if content is None else parse_info(content, f"{storage}/{INFO_FILE}")


def read_rejected(storage: Storage) -> list[dict[str, str]]:
    """Reads split, path and reason of each rejected image, of all splits.

    Raises:
        ValueError: A line is not an object of these three texts.
    """
    lines = parse_json_lines(storage.read(REJECTED_FILE) or b"", f"{storage}/{REJECTED_FILE}")
    keys = ("split", "path", "reason")
    return [{key: get(as_object(value, place), key, "a text", place) for key in keys} for place, value in lines]


def publish(storage: Storage, plan: Plan, record: dict[str, Any], reports: Sequence[ShardReport]) -> dict[str, Any]:
    """Adds a split whose shards are complete to the data set.

    Raises:
        ValueError: In the meantime, another process added a split with other classes.
        OSError: Shards are missing.

    Returns:
        The entry of the split in `_info.json`.
    """
    name = plan.options.name
    changes = sum((collections.Counter(report.changes) for report in reports), collections.Counter[str]())
    split = {
        "name": name,
        "num_samples": sum(report.num_samples for report in reports),
        "filenames": [report.name for report in reports],
        "shard_lengths": [report.num_samples for report in reports],
        "shard_bytes": [report.file_bytes[0] for report in reports],
        "image_bytes": sum(report.image_bytes for report in reports),
        "changes": dict(sorted(changes.items())),
        "conversion": record,
    }
    rejected = [*plan.listing.left_out, *(entry for report in reports for entry in report.rejected)]
    sizes = storage.sizes()
    if lost := [report.name for report in reports if sizes.get(report.name) != report.file_bytes[0]]:
        raise OSError(
            f"{storage}: {counted(len(lost), 'finished shard')} disappeared, for example {lost[0]}; "
            "all workers must have access to this folder"
        )
    with storage.lock(wait=True):
        clear_temporary(storage, r"_info\.json|rejected\.jsonl")
        _write_rejected(storage, name, rejected)
        info = read_info(storage)
        others = {key: value for key, value in info.get("splits", {}).items() if key != name}
        if others and info.get("classes") != list(plan.classes):
            raise ValueError(
                f"{storage}: another process added a split with other classes; --overwrite converts this split again"
            )
        splits = dict(sorted({**others, name: split}.items()))
        write_info(storage, {**info, "splits": splits, "classes": list(plan.classes)})
    return split


def write_info(storage: Storage, info: dict[str, Any]) -> None:
    """Replaces `_info.json`."""
    write_text(storage, INFO_FILE, json.dumps(info, indent=1) + "\n", durable=True)


def _write_rejected(storage: Storage, name: str, rejected: Sequence[tuple[str, str]]) -> None:
    """Replaces the entries of the split. A file without entries is deleted."""
    entries = [entry for entry in read_rejected(storage) if entry["split"] != name]
    entries += [{"split": name, "path": path, "reason": reason} for path, reason in rejected]
    entries.sort(key=lambda entry: entry["split"])
    if entries:
        write_text(storage, REJECTED_FILE, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    else:
        storage.delete(REJECTED_FILE)
