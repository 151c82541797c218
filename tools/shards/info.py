"""`shards info`: what a folder of shards holds."""

from pathlib import Path

from pipelines.shards import INFO_FILE, listed_tars, read_info


def describe(folder: Path) -> str:
    """A table of the data set's splits: shards, samples, classes, bytes.

    Raises:
        ValueError: The folder has no `_info.json`, or shards that it lists are missing.
    """
    info = read_info(folder)
    if not info.get("splits"):
        raise ValueError(f"{folder}: no {INFO_FILE} that lists splits; `shards convert` writes one")
    rows = [("split", "shards", "samples", "classes", "MB")]
    for name, split in sorted(info["splits"].items()):
        tars = listed_tars(folder, split)
        megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
        classes = len(info["classes"]) if "classes" in info else "?"
        rows.append((name, f"{len(tars):,}", f"{split['num_samples']:,}", f"{classes}", f"{megabytes:,.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    classes = info.get("classes", [])
    shown = ", ".join(classes[:10]) + (f", ... ({len(classes)})" if len(classes) > 10 else "")
    return "\n".join([*lines, f"classes: {shown or 'not listed'}"])
