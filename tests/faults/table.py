"""Writes the results of the campaign into a page: `python -m tests.faults.table RESULTS.jsonl docs/reliability.md`."""

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PARTS = {
    "kill": "Killed anywhere",
    "disk": "Disks",
    "store": "Object stores",
    "input": "Inputs",
    "trust": "Trust",
    "long": "Long and many",
}
KNOWN = ("part", "what", "tries", "outcomes", "seed", "long")


def main() -> None:
    results, page = map(Path, sys.argv[1:])
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    page.write_text(f"{before}{BEGIN}\n\n{tables(lines)}\n{END}{after}")


def tables(lines: list[dict[str, Any]]) -> str:
    """Returns a table for each part. Of a test that ran several times with one seed, the last result counts."""
    newest = {(line["part"], line["what"], line["seed"], line["long"]): line for line in lines}
    text = ""
    for part, title in PARTS.items():
        rows = [line for line in newest.values() if line["part"] == part]
        if rows:
            text += f"### {title}\n\n| what was tried | how often | what happened | seeds |\n|---|---:|---|---|\n"
            text += "".join(map(_row, rows)) + "\n"
    return text


def _row(line: dict[str, Any]) -> str:
    more = [f"{name}: {value}" for name, value in line.items() if name not in KNOWN]
    outcomes = [f"{count:,} {what}" for what, count in sorted(line["outcomes"].items(), key=lambda item: -item[1])]
    cells = (line["what"], f"{line['tries']:,}", "; ".join([*outcomes, *more]), f"from {line['seed']}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    main()
