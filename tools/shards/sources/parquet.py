"""Images in Parquet files, as Hugging Face's `datasets` lays them out."""

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


@dataclass(frozen=True)
class ParquetFiles:
    """Rows with an image, a struct of bytes and path or bytes alone, and a label, a number or a name.

    Rows cannot be read one by one: a group of them, hundreds of megabytes, is one compressed piece. A shard draws its samples
    from all over the set, so the images are first unpacked, file by file, into a scratch folder.
    """

    location: str
    files: tuple[Path, ...]
    image_key: str
    label_key: str
    scratch: Path
    num_workers: int

    def listing(self) -> Listing:
        names = self._check_columns()
        self.scratch.mkdir(parents=True, exist_ok=True)
        tasks = [Unpack(file, self.scratch / _unpacked_name(file), self.image_key, self.label_key) for file in self.files]
        for _ in parallel.run(unpack, tasks, min(self.num_workers, len(tasks))):
            pass
        extents, labels = Extents(unpacked=True), list[str]()
        for task in tasks:
            offset, modified = 0, task.file.stat().st_mtime_ns
            for name, size, label in json.loads(task.table.read_text())["rows"]:
                extents.append(Extent(name, str(task.data), offset, size, modified))
                labels.append(str(label))
                offset += size
        if not labels:
            raise ValueError(f"{self.location}: no rows")
        return labelled(self.location, extents, labels, names)

    def _check_columns(self) -> list[str] | None:
        """The class names that Hugging Face's metadata lists, or None."""
        for file in self.files:
            schema = open_parquet(file).schema_arrow
            for option, key in (("--image-key", self.image_key), ("--label-key", self.label_key)):
                if key not in schema.names:
                    raise ValueError(f"{file}: no column {key!r} among {', '.join(schema.names)}; {option} names another")
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        feature = features.get(self.label_key, {}) if isinstance(features, dict) else {}
        return feature.get("names") if isinstance(feature, dict) else None


def _unpacked_name(file: Path) -> str:
    """Another name for each file and each state of it, so that several conversions can share a scratch folder."""
    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Unpack:
    """One Parquet file, to be unpacked to `target.data` (the images' bytes) and `target.json` (their sizes and labels)."""

    file: Path
    target: Path
    image_key: str
    label_key: str

    @property
    def data(self) -> Path:
        return Path(f"{self.target}.data")

    @property
    def table(self) -> Path:
        return Path(f"{self.target}.json")


def unpack(task: Unpack) -> None:
    """Unpacks a file, unless that was done already.

    Raises:
        ValueError: A row has no image bytes; names it.
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


def _rows(task: Unpack) -> Iterator[tuple[str, bytes, Any]]:
    number = 0
    for batch in open_parquet(task.file).iter_batches(ROWS_AT_ONCE, columns=[task.image_key, task.label_key]):
        for image, label in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes) or label is None:
                raise ValueError(
                    f"{task.file}, row {number}: no {'label' if isinstance(data, bytes) else 'image bytes'}; "
                    "files that only name their images elsewhere cannot be converted"
                )
            if isinstance(label, bool) or not isinstance(label, (int, str)):
                raise ValueError(f"{task.file}, row {number}: label {label!r} is neither a class number nor a class name")
            path = image.get("path") if isinstance(image, dict) else None
            yield f"{task.file.stem}/{number:08d}{'_' + path if path else ''}", data, label
            number += 1


def open_parquet(path: Path) -> "pq.ParquetFile":
    """Opens a file.

    Raises:
        ValueError: pyarrow is missing, or the file is no Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow; pip install 'googlenet-dali[parquet]'") from error
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
