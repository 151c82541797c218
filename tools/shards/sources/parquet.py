"""Images in Parquet files, in the layout of Hugging Face's `datasets`."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.files import replace_text
from tools.shards import parallel
from tools.shards.sources.listing import Extent, Extents, Listing, labelled

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 64


def list_parquet(
    location: str, files: tuple[Path, ...], image_key: str, label_key: str, scratch: Path, num_workers: int
) -> Listing:
    """Lists rows with an image and a label, and unpacks the images.

    The image column holds bytes, or structs of bytes and path. The label column holds class numbers or names. The samples of a
    shard come from all over the set, but rows cannot be read one by one: they are compressed in groups of hundreds of
    megabytes. So the images of each Parquet file are first unpacked into one file in `scratch`.

    Raises:
        ValueError: A file cannot be read, or a column is missing, or a row has no image or label.
    """
    names = _check_columns(files, image_key, label_key)
    scratch.mkdir(parents=True, exist_ok=True)
    targets = [scratch / _unpacked_name(file) for file in files]
    tasks = [
        _Unpack(file, Path(f"{target}.data"), Path(f"{target}.json"), image_key, label_key)
        for file, target in zip(files, targets, strict=True)
    ]
    for _ in parallel.run(_unpack, tasks, min(num_workers, len(tasks))):
        pass
    extents, labels = Extents(unpacked=True), list[str]()
    for task in tasks:
        offset, modified = 0, task.file.stat().st_mtime_ns
        for name, size, label in json.loads(task.table.read_text())["rows"]:
            extents.append(Extent(name, str(task.data), offset, size, modified))
            labels.append(str(label))
            offset += size
    if not labels:
        raise ValueError(f"{location}: no rows")
    return labelled(location, extents, labels, names)


def _check_columns(files: tuple[Path, ...], image_key: str, label_key: str) -> list[str] | None:
    """Returns the class names in Hugging Face's metadata, or None."""
    for file in files:
        schema = _open_parquet(file).schema_arrow
        for option, key in (("--image-key", image_key), ("--label-key", label_key)):
            if key not in schema.names:
                raise ValueError(f"{file}: no column {key!r} among {', '.join(schema.names)}; {option} names another")
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(label_key, {}) if isinstance(features, dict) else {}
    return feature.get("names") if isinstance(feature, dict) else None


def _unpacked_name(file: Path) -> str:
    """Returns a name that is unique to the file and its state, so several conversions can share a scratch folder."""
    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class _Unpack:
    """A Parquet file to unpack. `data` receives the bytes of the images, and `table` their sizes and labels."""

    file: Path
    data: Path
    table: Path
    image_key: str
    label_key: str


def _unpack(task: _Unpack) -> None:
    """Unpacks a file, unless an earlier run has done so.

    Raises:
        ValueError: A row has no image bytes or no label.
    """
    origin = [task.image_key, task.label_key]
    if task.table.exists() and json.loads(task.table.read_text())["origin"] == origin:
        return
    rows = []
    temporary = task.data.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        for name, data, label in _rows(task):
            file.write(data)
            rows.append((name, len(data), label))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(task.data)
    replace_text(task.table, json.dumps({"origin": origin, "rows": rows}))


def _rows(task: _Unpack) -> Iterator[tuple[str, bytes, Any]]:
    number = 0
    for batch in _open_parquet(task.file).iter_batches(ROWS_AT_ONCE, columns=[task.image_key, task.label_key]):
        for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes) or label is None:
                raise ValueError(
                    f"{task.file}, row {number}: no {'label' if isinstance(data, bytes) else 'image bytes'}; "
                    "files that only refer to images elsewhere cannot be converted"
                )
            if isinstance(label, bool) or not isinstance(label, (int, str)):
                raise ValueError(f"{task.file}, row {number}: label {label!r} is neither a class number nor a class name")
            path = image.get("path") if isinstance(image, dict) else None
            yield f"{task.file.stem}/{number:08d}{'_' + path if path else ''}", data, label
            number += 1


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
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
