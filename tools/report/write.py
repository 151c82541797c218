"""From run folders to a file: what is asked for, checked, drawn and put in its place."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pipelines.files import replace_text
from tools.report.runs import read_runs


def write_report(paths: Sequence[Path], output: Path | None = None) -> str:
    """Writes the report on the runs of these folders; gives a line that says what was written.

    Args:
        paths: Folders of runs.
        output: A `.html` or `.png` in a folder that is there, replaced where there is one; by default report.html in the first.

    Raises:
        ValueError: There is no such run, or the output cannot be called that, or matplotlib is not installed.
    """
    if not paths:
        raise ValueError("no run is named; name the folders of one or several, as in runs/20260101-120000-1234")
    if output is not None and output.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"--output {output}: the name has to end in .html or .png")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output}: a folder; name a file in it")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed, which draws the charts; pip install 'googlenet-dali[plot]'")
    runs = read_runs(paths)
    from tools.report.charts import write_picture
    from tools.report.page import page

    output = output or paths[0] / "report.html"
    if output.suffix.lower() == ".png":
        write_picture(runs, output)
    else:
        replace_text(output, page(runs))
    return f"{output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {output.stat().st_size / 1000:,.0f} kB"
