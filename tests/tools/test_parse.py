"""Every command names an unknown option, with the nearest right one, and a pattern that was not quoted."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.helpers.command import run_main
from tools.bench.convert import main as measure_conversion
from tools.evaluate.cli import main as evaluate
from tools.export.cli import main as export
from tools.predict.cli import main as predict
from tools.report.cli import main as report
from tools.shards.cli import main as shards
from tools.throughput.cli import main as throughput
from train import main as train

Main = Callable[[Sequence[str]], None]


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (shards, "convert SRC DST --lables=x.csv", "no option --lables (did you mean --labels?)"),
        (shards, "convert SRC DST --shard_sampels 1 --qqq", "--shard_sampels (did you mean --shard-samples?), --qqq; "),
        (shards, "convert -name valid SRC DST", "no option -name (did you mean --name?)"),
        (shards, "info --sampel 3 X", "shards info has no option --sampel (did you mean --sample?)"),
        (shards, "info x.\x1b[31m --nam\x1b", "shards info has no option --nam\\x1b"),
        (throughput, "loader X --batchsize 3", "throughput loader has no option --batchsize (did you mean --batch-size?)"),
        (predict, "--topp 3 best.pt x.jpg", "predict has no option --topp (did you mean --top?)"),
        (evaluate, "best.pt X --batchsize 3", "evaluate has no option --batchsize (did you mean --batch-size?)"),
        (export, "best.pt --formatt onnx", "export-model has no option --formatt"),
        (report, "run --outptu x", "report has no option --outptu (did you mean --output?)"),
        (train, "--epoch 3", "train.py has no option --epoch (did you mean --epochs?); train.py --help lists its options"),
        (train, "--train x --data.vaild y", "--train (did you mean --data.train?), --data.vaild (did you mean --data.valid?)"),
    ],
)
def test_unknown_words_are_named(main: Main, words: str, message: str) -> None:
    done = run_main(main, *words.split())
    assert done.status == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["info", "verify", "index"])
def test_a_pattern_needs_quotes(tmp_path: Path, verb: str) -> None:
    files = [tmp_path / f"x-{number:03d}.tar" for number in range(120)]
    for file in files:
        file.touch()
    done = run_main(shards, verb, *files)
    message = f"error: 120 .tar files are too many for shards {verb}; put the pattern in quotes: '{tmp_path}/x-*.tar'\n"
    assert (done.status, done.stderr) == (2, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert SRC", "DST"),
        ("convert SRC DST --seed x", "--seed"),
        ("convert SRC DST --shard-samples", "Missing value for argument '--shard-samples'"),
        ("convert SRC DST --seed -1.5", "--seed"),
        ("convert SRC DST --check fast", "fast"),
        ("", "convert"),
    ],
)
def test_other_mistakes_are_not_called_unknown_options(words: str, message: str) -> None:
    done = run_main(shards, *words.split())
    assert done.status == 2
    assert message in done.stderr
    assert "no option" not in done.stderr
    assert "pattern" not in done.stderr


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (shards, "preview SHARDS -o URL"),
        (shards, "verify SHARDS --known x URL"),
        (train, "--data.train x --data.valid x --run-dir=URL"),
        (train, "--data.train x --data.valid x --init-from URL"),
        (evaluate, "URL SHARDS"),
        (report, "run URL"),
        (measure_conversion, "URL --rounds 1"),
    ],
)
@pytest.mark.parametrize("url", ["s3://bucket/x.pt", "https://host/x"])
def test_a_url_is_no_local_path(main: Main, words: str, url: str) -> None:
    done = run_main(main, *words.replace("URL", url).split())
    assert (done.status, done.stderr) == (2, f"error: {url}: a file or folder of this machine is needed here, not a URL\n")


def test_after_dashes_a_word_is_no_option() -> None:
    done = run_main(shards, "info", "--", "--nam")
    assert (done.status, "no option" in done.stderr) == (2, False)
