"""A file that lists the class of each image."""

import collections
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.shards.sources.listing import Extents, Listing, labelled

IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "imageid", "image_id", "name", "id")
LABEL_COLUMNS = ("class", "label", "target", "category", "class_name", "synset", "wnid", "predictionstring")


@dataclass(frozen=True)
class LabelFile:
    """CSV, TSV or blank-separated lines of image path and class, or one class per line for the images in sorted order.

    A header line is recognized. It determines the columns if there are more than two. Paths are relative to the source, and may
    lack the extension. In Kaggle's `PredictionString`, the first word is the class.

    Attributes:
        path: The file.
        class_names: A file with two columns, the label as in `path` and the class name, or None.
    """

    path: Path
    class_names: Path | None = None

    def apply(self, location: str, extents: Extents) -> Listing:
        """Returns the images that the file names, with their classes.

        Raises:
            ValueError: The file has none of these layouts, or names an image twice, or names an image that does not exist.
        """
        rows = list(read_table(self.path))
        if not rows:
            raise ValueError(f"{self.path}: empty; lines of image path and class are needed")
        by_image = self._in_order(extents, rows) if len(rows[0][1]) == 1 else self._by_path(location, extents, rows)
        labels = self._rename(by_image)
        named = Extents(extents.root)
        for place in sorted(labels):
            named.append(extents[place])
        listing = labelled(location, named, [labels[place] for place in sorted(labels)])
        if len(named) < len(extents):
            listing.notes.append(f"skipped {len(extents) - len(named):,} images in {location} that {self.path} does not name")
        return listing

    def _in_order(self, extents: Extents, rows: Sequence[tuple[int, list[str]]]) -> dict[int, str]:
        """Reads one class per line, as in `ILSVRC2012_validation_ground_truth.txt`."""
        if len(rows) != len(extents):
            raise ValueError(
                f"{self.path}: {len(rows):,} lines without image paths for {len(extents):,} images; "
                "give each image a line, or each line a path"
            )
        places = sorted(range(len(extents)), key=extents.names.__getitem__)
        return {place: row[0] for place, (_, row) in zip(places, rows, strict=True)}

    def _by_path(self, location: str, extents: Extents, rows: Sequence[tuple[int, list[str]]]) -> dict[int, str]:
        places = {name: place for place, name in enumerate(extents.names)}
        stems: dict[str, int | None] = {}
        image_column, label_column, first_word = 0, 1, False
        header = [cell.lower() for cell in rows[0][1]]
        if (header[0] in IMAGE_COLUMNS and rows[0][1][0] not in places) or any(cell in IMAGE_COLUMNS for cell in header[1:]):
            image_column = next(i for i, cell in enumerate(header) if cell in IMAGE_COLUMNS)
            label_column = self._label_column(header, image_column)
            first_word = header[label_column] == "predictionstring"
            rows = rows[1:]
        labels: dict[int, str] = {}
        missing = []
        for line, row in rows:
            if len(row) <= max(image_column, label_column) or not row[label_column]:
                raise ValueError(f"{self.path}, line {line}: {' '.join(row)!r} has no path and class")
            name, label = row[image_column].removeprefix("./"), row[label_column]
            place = places.get(name)
            if place is None:
                stems = stems or _by_stem(extents.names)
                place = stems.get(name)
            if place is None:
                missing.append((line, name))
            elif place in labels:
                raise ValueError(f"{self.path}, line {line}: {name} occurs twice")
            else:
                labels[place] = label.split()[0] if first_word else label
        if missing:
            shown = ", ".join(f"{name} (line {line})" for line, name in missing[:3])
            raise ValueError(f"{self.path}: names {len(missing):,} images that are not in {location}: {shown}")
        if not labels:
            raise ValueError(f"{self.path}: has only a header line")
        return labels

    def _label_column(self, header: list[str], image_column: int) -> int:
        for column, cell in enumerate(header):
            if cell in LABEL_COLUMNS:
                return column
        if len(header) != 2:
            raise ValueError(
                f"{self.path}: none of its columns {', '.join(header)} has the name of a label column "
                f"({', '.join(LABEL_COLUMNS)})"
            )
        return 1 - image_column

    def _rename(self, labels: dict[int, str]) -> dict[int, str]:
        if self.class_names is None:
            return labels
        names = {row[0]: row[1] for _, row in read_table(self.class_names, names_last=True) if len(row) > 1}
        unknown = sorted(set(labels.values()) - set(names))
        if unknown:
            raise ValueError(f"{self.class_names}: no name for the labels {', '.join(unknown[:10])} of {self.path}")
        repeated = [name for name, count in collections.Counter(names.values()).items() if count > 1]
        if repeated:
            raise ValueError(f"{self.class_names}: several labels are called {repeated[0]!r}; give each class its own name")
        return {place: names[label] for place, label in labels.items()}


def _by_stem(names: Sequence[str]) -> dict[str, int | None]:
    """Maps names without extension to indices, or to None if several images share one."""
    stems: dict[str, int | None] = {}
    for place, name in enumerate(names):
        folder, slash, file = name.rpartition("/")
        stem = folder + slash + file.rpartition(".")[0]
        stems[stem] = None if stem in stems else place
    return stems


def read_table(path: Path, names_last: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yields line number and cells of each line that is not blank.

    Args:
        path: Lines of cells, separated by tabs, or by commas (in a `.csv`, or if the first line has no blanks), or by blanks.
        names_last: Whether to split lines with blanks at the first blank, because class names may contain blanks. By default
            they are split at the last blank, because paths may contain blanks.

    Raises:
        ValueError: The file does not exist, or is not text, or is not valid CSV.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from error
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if "\t" in first:
        delimiter = "\t"
    elif "," in first and (path.suffix.lower() == ".csv" or len(first.split()) == 1):
        delimiter = ","
    else:
        split = str.split if names_last else str.rsplit
        yield from ((number, split(line.strip(), None, 1)) for number, line in enumerate(lines, 1) if line.strip())
        return
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is there a stray quotation mark?") from error
