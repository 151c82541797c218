"""Images in Parquet files, in the layout of Hugging Face's `datasets`."""

import collections
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.files import replace_text
from pipelines.printable import counted, printable
from pipelines.shards.labels import SHOWN, unlisted_label
from tools.shards import parallel
from tools.shards.sources.listing import Extent, Extents, Listing, labelled
from tools.shards.sources.scratch import open_scratch, unpacked_path, write_unpacked

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 64
REASONS_SHOWN = 10
TABLE_VERSION = 3  # of the unpacked files, which --scratch keeps
PATH_ONLY = "only the path of an image file, without its bytes"


def list_parquet(
    location: str, files: tuple[Path, ...], image_key: str, label_key: str, scratch: Path, num_workers: int
) -> Listing:
    """Lists rows with an image and a label, and unpacks the images.

    The image column holds bytes, or structs of bytes and path. The label column holds class numbers or names. The samples of a
    shard come from all over the set, but rows cannot be read one by one: they are compressed in groups of hundreds of
    megabytes. So the images of each Parquet file are first unpacked into one file in `scratch`. A row without image or label is
    left out.

    Raises:
        ValueError: A file cannot be read, or a column is missing, or no row has an image and a label.
    """
    names = _check_columns(files, image_key, label_key)
    open_scratch(scratch)
    targets = [unpacked_path(scratch, file, image_key, label_key, TABLE_VERSION) for file in files]
    tasks = [
        _Unpack(file, Path(f"{target}.data"), Path(f"{target}.json"), image_key, label_key)
        for file, target in zip(files, targets, strict=True)
    ]
    for _ in parallel.run(_unpack, tasks, min(num_workers, len(tasks))):
        pass
    extents, labels, left_out = Extents(unpacked=True), list[str](), list[tuple[str, str]]()
    for task in tasks:
        offset, modified = 0, task.file.stat().st_mtime_ns
        table = json.loads(task.table.read_text())
        left_out += [(name, reason) for name, reason in table["left_out"]]
        for name, size, label in table["rows"]:
            extents.append(Extent(name, str(task.data), offset, size, modified))
            labels.append(label)
            offset += size
    if not labels:
        raise ValueError(f"{location}: {_why_no_rows([reason for _, reason in left_out])}")
    listing = labelled(location, extents, labels, names)
    listing.left_out = left_out
    return listing


def _why_no_rows(reasons: list[str]) -> str:
    if not reasons:
        return "no rows"
    shown = sorted(collections.Counter(reasons).most_common(REASONS_SHOWN))
    rest = ["..."] if len(set(reasons)) > len(shown) else []
    counts = "; ".join([f"{counted(count, 'row')}: {reason}" for reason, count in shown] + rest)
    way_out = "; convert the folder of these files with --labels" if set(reasons) == {PATH_ONLY} else ""
    return f"none of its {len(reasons):,} rows has an image and a label ({counts}){way_out}"


def _check_columns(files: tuple[Path, ...], image_key: str, label_key: str) -> list[str] | None:
    """Returns the class names in Hugging Face's metadata, or None."""
    for file in files:
        schema = _open_parquet(file).schema_arrow
        images = [field.name for field in schema if _may_hold_images(str(field.type))]
        others = [name for name in schema.names if name not in images]
        for option, key, likely in (("--image-key", image_key, images), ("--label-key", label_key, others)):
            if schema.names.count(key) != 1:
                problem = "several columns" if key in schema.names else "no column"
                names = printable(", ".join(schema.names))
                hint = printable(", ".join(name for name in likely if name != key))
                raise ValueError(
                    f"{file}: {problem} {key!r} among {names}; {option} names another{hint and f', for example {hint}'}"
                )
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label_key]
        names = feature["names"]
    except (KeyError, TypeError, ValueError):  # metadata of another tool, or of another form
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _may_hold_images(type_name: str) -> bool:
    return "binary" in type_name and not type_name.startswith(("list", "large_list", "map"))


@dataclass(frozen=True)
class _Unpack:
    """A Parquet file to unpack. `data` receives the bytes of the images, and `table` their sizes and labels."""

    file: Path
    data: Path
    table: Path
    image_key: str
    label_key: str


def _unpack(task: _Unpack) -> None:
    """Unpacks a file, unless an earlier run has done so."""
    if task.table.exists():
        return
    rows: list[tuple[str, int, str]] = []
    left_out: list[tuple[str, str]] = []

    def images() -> Iterator[bytes]:
        rows.clear()
        left_out.clear()
        for number, (image, label) in enumerate(_rows(task)):
            path = image.get("path") if isinstance(image, dict) else None
            name = f"{task.file.stem}/{number:08d}{f'_{path}' if isinstance(path, str) and path else ''}"
            try:
                data, text = _image_bytes(image), _label_text(label)
            except ValueError as error:
                left_out.append((name, str(error)))
            else:
                rows.append((name, len(data), text))
                yield data

    write_unpacked(task.data, images)
    replace_text(task.table, json.dumps({"rows": rows, "left_out": left_out}))


def _rows(task: _Unpack) -> Iterator[tuple[Any, Any]]:
    """Yields image and label of each row.

    Raises:
        ValueError: The file is damaged.
    """
    number = 0
    file = _open_parquet(task.file)
    from pyarrow import ArrowException

    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[task.image_key, task.label_key]):
            columns = (batch.column(batch.schema.names.index(key)).to_pylist() for key in (task.image_key, task.label_key))
            yield from zip(*columns, strict=True)
            number += batch.num_rows
    except (ArrowException, OSError) as error:
        raise ValueError(f"{task.file}: damaged in the rows from {number} on ({_of_content(error, task.file)})") from error


def _image_bytes(image: object) -> bytes:
    """Returns the bytes of an image, or raises ValueError with the reason why there are none."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data
    if isinstance(data, str) or (isinstance(image, dict) and data is None and isinstance(image.get("path"), str)):
        raise ValueError(PATH_ONLY)
    what = "a list" if isinstance(data, list) else "a single value"
    raise ValueError("no image" if data is None else f"the image is {what} and not the bytes of a file")


def _label_text(label: object) -> str:
    """Returns a class number or name, or raises ValueError with the reason why there is none."""
    if isinstance(label, float) and label.is_integer():  # pandas turns integers beside missing ones into floats
        label = int(label)
    if label is None or label != label or label == "":
        raise ValueError("no label")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"label {printable(str(label)[:SHOWN])} is neither a class number nor a class name")
    if label == -1:
        raise ValueError("label -1, which stands for a missing label")
    return unlisted_label(str(label))


def _open_parquet(path: Path) -> "pq.ParquetFile":
    """Opens a Parquet file.

    Raises:
        ValueError: pyarrow is not installed, or the file is not a Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow; pip install -e '.[parquet]'") from error
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({_of_content(error, path)})") from error


def _of_content(error: Exception, path: Path) -> str:
    """Returns the text of an error of the content in one line, and raises any other: for both, pyarrow has an OSError."""
    if isinstance(error, OSError) and error.errno is not None:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    return printable(" ".join(str(error).split()))
