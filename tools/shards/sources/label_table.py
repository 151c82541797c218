"""Reads lines of cells, as spreadsheets, Caffe, Kaggle and MXNet write them, and finds out what separates the cells."""

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.printable import printable

SEPARATORS = {"\t": "tab", ";": "semicolon", "|": "vertical bar", ",": "comma"}  # the first that fits is used, blanks come last
LINES_TO_COMPARE = 1000

Row = tuple[int, list[str]]  # line number from 1, cells
IsKnown = Callable[[str, int], bool]


@dataclass(frozen=True)
class Table:
    """The lines of a file.

    Attributes:
        path: The file.
        rows: Line number and cells of each line that is neither blank nor a comment.
        separator: What separates the cells: a character, or "" for blanks.
        key: Column whose cells are known, or None if no cell is.
    """

    path: Path
    rows: list[Row]
    separator: str
    key: int | None

    @property
    def separator_name(self) -> str:
        return SEPARATORS.get(self.separator, repr(self.separator))

    def drop_header(self) -> "Table":
        return Table(self.path, self.rows[1:], self.separator, self.key)

    def require_width(self, width: int = 2) -> None:
        """Raises ValueError if a line has more cells than `width`, and more than two: a separator in a name would cut it."""
        for line, row in self.rows:
            if len(row) > max(width, 2):
                raise ValueError(
                    f"{self.path}, line {line}: {len(row)} cells instead of {width}; "
                    f"put a cell that contains a {self.separator_name} in quotation marks"
                )


def read_table(
    path: Path, lines: Sequence[str], known: Sequence[IsKnown], *, comments: bool = True, names_last: bool = False
) -> Table:
    """Divides lines into cells. The separator is the one that gives the most lines with a known cell.

    Args:
        path: The file, for messages. The name `.csv` prefers commas.
        lines: Its lines. The first may be `sep=;`, as Excel reads it.
        known: Whether a cell is one of those that the file is expected to have, given the cell and its column. The first of
            these functions that knows a cell is used.
        comments: Whether to skip lines that begin with `#`.
        names_last: Whether to split lines with blanks at the first blank, because class names may contain blanks. By default
            they are split at the last blank, because paths may contain blanks.

    Raises:
        ValueError: A line is not valid CSV.
    """
    separators, skipped = [*SEPARATORS, ""], 0
    if found := re.fullmatch(r"sep=(.)", lines[0].strip("\r\n"), re.IGNORECASE):
        separators, skipped = [found[1]], 1
    numbered = [
        (number, line)
        for number, line in enumerate(lines[skipped:], skipped + 1)
        if line.strip() and not (comments and line.lstrip().startswith("#"))
    ]
    sample = numbered[:LINES_TO_COMPARE]
    best, best_count, key = None, 0, None
    for is_known in known:
        for separator in separators if best is None else ():
            count, column = _count_known([_cells(line, separator, names_last) for _, line in sample], is_known)
            if count > best_count:
                best, best_count, key = separator, count, column
    if best is None:
        best = _usual_separator(path, sample, separators)
    rows = _read_rows(path, numbered, best) if best else ((number, _cells(line, "", names_last)) for number, line in numbered)
    return Table(path, _without_empty_columns(list(rows)), best, key)


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a file: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ValueError: The file does not exist, or is not text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    bad = 0
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        if "\0" in text:
            bad = text.count("\n", 0, text.index("\0")) + 1
    except UnicodeDecodeError as error:
        bad = data.count(b"\n", 0, error.start) + 1
    if bad:
        raise ValueError(f"{path}, line {bad}: not UTF-8 text; save the file as UTF-8 text, in Excel as 'CSV UTF-8'")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _count_known(rows: Sequence[list[str]], is_known: IsKnown) -> tuple[int, int | None]:
    """Returns the number of lines with a known cell beside others, and the column with the most of them."""
    columns: dict[int, int] = {}
    count = 0
    for row in rows:
        known = [column for column, cell in enumerate(row) if len(row) > 1 and is_known(cell, column)]
        count += bool(known)
        for column in known:
            columns[column] = columns.get(column, 0) + 1
    return count, max(columns, key=lambda column: (columns[column], -column), default=None)


def _usual_separator(path: Path, lines: Sequence[tuple[int, str]], separators: Sequence[str]) -> str:
    """Returns the separator that is in every line, if no cell is known. Commas and blanks together may be a class name."""
    for separator in separators:
        may_be_name = separator == "," and path.suffix.lower() != ".csv" and any(len(line.split()) > 1 for _, line in lines)
        if separator and not may_be_name and lines and all(separator in line for _, line in lines):
            return separator
    return separators[-1]


def _cells(line: str, separator: str, names_last: bool) -> list[str]:
    """Returns the cells of one line. A quotation mark that is not closed ends with the line."""
    if separator:
        try:
            row = next(csv.reader([line], delimiter=separator, skipinitialspace=separator != "\t"))
        except csv.Error:  # reported when the whole file is read
            row = line.split(separator)
        return [cell.strip() for cell in row]
    cells = line.strip().split(None, 1) if names_last else line.strip().rsplit(None, 1)
    return [cell[1:-1] if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell for cell in cells]


def _read_rows(path: Path, lines: Sequence[tuple[int, str]], separator: str) -> Iterator[Row]:
    """Yields line number and cells of each line of a CSV file. A cell in quotation marks may have several lines."""
    reader = csv.reader((line for _, line in lines), delimiter=separator, skipinitialspace=separator != "\t", strict=True)
    first = 0
    try:
        for row in reader:
            yield lines[first][0], [cell.strip() for cell in row]
            first = reader.line_num
    except csv.Error as error:
        line, text = lines[min(first, len(lines) - 1)]
        hint = "; is there a stray quotation mark?" if '"' in text else ""
        raise ValueError(f"{path}, line {line}: {error}{hint}") from error


def _without_empty_columns(rows: list[Row]) -> list[Row]:
    """Removes lines whose cells are all empty, and the last columns if they are empty in all lines, as after `a.jpg;cat;`."""
    rows = [(line, row) for line, row in rows if any(row)]
    width = max((len(row) for _, row in rows), default=0)
    while width > 1 and all(len(row) < width or not row[width - 1] for _, row in rows):
        width -= 1
    return [(line, row[:width]) for line, row in rows]


def shown(row: Sequence[str]) -> str:
    """Returns the cells of a line for a message."""
    return printable(" ".join(row))
