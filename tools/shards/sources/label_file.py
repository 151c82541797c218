"""A file that lists the class of each image."""

import collections
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.printable import counted, printable
from pipelines.shards.labels import unlisted_label
from tools.shards.sources.label_table import SEPARATORS, Row, Table, read_lines, read_table, shown
from tools.shards.sources.listing import Extents, Listing, is_image_name, labelled

IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "imageid", "image_id", "name", "id")
LABEL_COLUMNS = ("class", "label", "target", "category", "class_name", "synset", "wnid", "predictionstring")


@dataclass(frozen=True)
class LabelFile:
    """Lines of image path and class, or one class per line for the images in sorted order.

    Cells are separated by tabs, semicolons, vertical bars, commas or blanks: by what makes most of the paths those of images. A
    header line is recognized. It determines the columns if there are more than two. Paths are relative to the source, and may
    lack the extension. In Kaggle's `PredictionString`, the first word is the class.

    Attributes:
        path: The file.
        class_names: A file with two columns, the label as in `path` and the class name, or None.
    """

    path: Path
    class_names: Path | None = None

    def apply(self, location: str, extents: Extents, left_out: Sequence[tuple[str, str]] = ()) -> Listing:
        """Returns the images that the file names, with their classes.

        Args:
            location: The source.
            extents: Its images.
            left_out: Name and reason of images and folders that cannot be used. The file may name them.

        Raises:
            ValueError: The file has none of these layouts, or names an image twice, or names an image that does not exist.
        """
        images = _Images(location, extents.names, dict(left_out))
        comments = not any(name.startswith("#") for name in extents.names)
        lines = read_lines(self.path)  # once: it may be a pipe
        # Class numbers can look like the names of images without extension, so these are sought in the first column only.
        known = (lambda cell, _: images.has_path(cell), lambda cell, column: column == 0 and images.has(cell))
        table = read_table(self.path, lines, known, comments=comments)
        if not table.rows:
            raise ValueError(f"{self.path}: empty; lines of image path and class are needed")
        if all(len(row) > 1 for _, row in table.rows) or table.key is not None:
            by_image = self._by_path(images, table)
        else:
            by_image = self._in_order(images, table)
        if not by_image:
            [(name, reason), *_] = left_out
            first = f"{printable(name)} ({reason})"
            raise ValueError(f"{self.path}: none of the images that it names can be used; the first that cannot is {first}")
        labels = self._rename(by_image)
        named = Extents(extents.root)
        for place in sorted(labels):
            named.append(extents[place])
        listing = labelled(location, named, [labels[place] for place in sorted(labels)])
        if len(named) < len(extents):
            skipped = counted(len(extents) - len(named), "image")
            listing.notes.append(f"skipped {skipped} in {location} that {self.path} does not name")
        return listing

    def _in_order(self, images: "_Images", table: Table) -> dict[int, str]:
        """Reads one class per line, as in `ILSVRC2012_validation_ground_truth.txt`."""
        rows = table.rows
        names = sorted([*images.names, *filter(is_image_name, images.left_out)])
        if rows[0][1][0].lower() in LABEL_COLUMNS and len(rows) == len(names) + 1:
            rows = rows[1:]
        self._refuse_names(images, rows)
        if len(rows) != len(names):
            raise ValueError(
                f"{self.path}: {counted(len(rows), 'line')} without image paths for {counted(len(names), 'image')}; "
                "give each image a line, or each line a path"
            )
        labels = {name: self._label(*row) for name, row in zip(names, rows, strict=True) if name in images.places}
        return {images.places[name]: label for name, label in labels.items()}

    def _label(self, line: int, cells: Sequence[str]) -> str:
        """Returns the label in these cells of a line; with a file of class names, it may be any text."""
        label = " ".join(cells)
        try:
            return label if self.class_names is not None else unlisted_label(label)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {line}: {error}") from error

    def _refuse_names(self, images: "_Images", rows: Sequence[Row]) -> None:
        """Raises ValueError if lines without a known separator name images: they would all become classes."""
        separators = ", ".join(f"a {name}" for name in SEPARATORS.values())
        heads = set()
        for line, row in rows:
            text = " ".join(row)
            if any("." in word and is_image_name(word) for word in re.findall(r"[\w.]+", text)):
                raise ValueError(
                    f"{self.path}, line {line}: {printable(text)!r} has the name of an image, "
                    f"but no class after {separators} or a blank"
                )
            heads.add(re.findall(r"(?:[\w./-]*\w)?", text)[0])
        if len(heads) == len(rows) == len(images.names) and all(map(images.has, heads)):
            raise ValueError(
                f"{self.path}: each line begins with the name of an image, but has no class after {separators} or a blank"
            )

    def _by_path(self, images: "_Images", table: Table) -> dict[int, str]:
        image_column, label_column, has_header = self._columns(images, table)
        first_word = has_header and table.rows[0][1][label_column].lower() == "predictionstring"
        table = table.drop_header() if has_header else table
        if not table.rows:
            raise ValueError(f"{self.path}: has only a header line")
        labels: dict[int, str] = {}
        missing = []
        for line, row in table.rows:
            if len(row) <= max(image_column, label_column) or not (row[label_column] and row[image_column]):
                lacks = "path" if len(row) > image_column and not row[image_column] else "class"
                raise ValueError(f"{self.path}, line {line}: {shown(row).strip()!r} has no {lacks}")
            name, label = row[image_column], row[label_column]
            place = images.find(name)
            if place is None:
                missing += [] if images.is_left_out(name) else [(line, name)]
            elif place in labels:
                raise ValueError(f"{self.path}, line {line}: {printable(name)} occurs twice")
            else:
                labels[place] = self._label(line, [label.split()[0] if first_word else label])
        if missing:
            examples = ", ".join(f"{printable(name)} (line {line})" for line, name in missing[:3])
            header = [line for line, _ in missing] == [table.rows[0][0]] and not has_header and not is_image_name(missing[0][1])
            hint = "; if this line has the names of the columns, call them path and class" if header else ""
            count = counted(len(missing), "image")
            raise ValueError(f"{self.path}: names {count} missing from {images.location}: {examples}{hint}")
        return labels

    def _columns(self, images: "_Images", table: Table) -> tuple[int, int, bool]:
        """Returns the columns of image and label, and whether the first line has the names of the columns."""
        first = table.rows[0][1]
        header = [cell.lower() for cell in first]
        named = next((i for i, cell in enumerate(header) if cell in IMAGE_COLUMNS), None)
        if named is not None and not any(images.has_path(cell) for cell in first) and (named or not images.has(first[0])):
            image_column = named if table.key is None else table.key
            table.require_width(len(header))
            return image_column, self._label_column(header, image_column), True
        if any(len(row) > 2 for _, row in table.rows) and len(first) > 2:
            raise ValueError(
                f"{self.path}: {len(first)} columns without names; add a first line of names, such as path and class, "
                "or leave only these two columns, "
                f"or put cells that contain a {table.separator_name} in quotation marks"
            )
        table.require_width(len(first))
        image_column = table.key or 0
        return image_column, 1 - image_column, False

    def _label_column(self, header: list[str], image_column: int) -> int:
        for column, cell in enumerate(header):
            if cell in LABEL_COLUMNS and column != image_column:
                return column
        if len(header) != 2:
            raise ValueError(
                f"{self.path}: no column of classes among {printable(', '.join(header))}; "
                f"name it {', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]}"
            )
        return 1 - image_column

    def _rename(self, labels: dict[int, str]) -> dict[int, str]:
        if self.class_names is None:
            return labels
        wanted, lines = set(labels.values()), read_lines(self.class_names)
        table = read_table(self.class_names, lines, [lambda cell, _: cell in wanted], comments=False, names_last=True)
        table.require_width()
        key = table.key or 0
        names: dict[str, str] = {}
        for line, row in table.rows:
            if len(row) < 2 or not row[1 - key]:
                continue  # an error if the label is used
            if row[key] in names:
                raise ValueError(f"{self.class_names}, line {line}: a second name for the label {printable(row[key])}")
            names[row[key]] = row[1 - key]
        if unknown := sorted(wanted - set(names)):
            shown_labels = printable(", ".join(unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise ValueError(f"{self.class_names}: no name for these labels of {self.path}: {shown_labels}")
        repeated = [name for name, count in collections.Counter(names.values()).items() if count > 1]
        if repeated:
            raise ValueError(f"{self.class_names}: several labels are called {repeated[0]!r}; give each class its own name")
        return {place: names[label] for place, label in labels.items()}


class _Images:
    """Finds images by the paths in a label file.

    A path is relative to the source, or an absolute path of any system that ends in the name of the source and a relative path.
    It may lack the extension.
    """

    def __init__(self, location: str, names: Sequence[str], left_out: Mapping[str, str]) -> None:
        self.location, self.names, self.left_out = location, names, left_out
        self.places = {name: place for place, name in enumerate(names)}
        self._stems: dict[str, int | None] = {}
        self._folder = os.path.basename(location.rstrip("/"))

    def has_path(self, path: str) -> bool:
        return self._find(path, self.places) is not None

    def has(self, path: str) -> bool:
        return self.find(path) is not None

    def is_left_out(self, path: str) -> bool:
        """Returns whether an image, or a folder above it, was left out."""
        parts = path.replace("\\", "/").removeprefix("./").split("/")
        return any("/".join(parts[:i]) in self.left_out for i in range(1, len(parts) + 1))

    def find(self, path: str) -> int | None:
        """Returns the index of an image, or None if there is no such image, or several without regard to the extension."""
        if (place := self.places.get(path)) is not None:
            return place
        self._stems = self._stems or _by_stem(self.names)
        if (place := self._stems.get(path)) is not None:
            return place
        place = self._find(path, self.places)
        return self._find(path, self._stems) if place is None else place

    def _find(self, path: str, places: Mapping[str, int | None]) -> int | None:
        if path in places:
            return places[path]
        path = path.replace("\\", "/").removeprefix("./")
        if path in places:
            return places[path]
        _, found, below = f"/{path}".partition(f"/{self._folder}/")
        return places.get(below) if found and self._folder else None


def _by_stem(names: Sequence[str]) -> dict[str, int | None]:
    """Maps names without extension to indices, or to None if several images share one."""
    stems: dict[str, int | None] = {}
    for place, name in enumerate(names):
        folder, slash, file = name.rpartition("/")
        stem = folder + slash + file.rpartition(".")[0]
        stems[stem] = None if stem in stems else place
    return stems
