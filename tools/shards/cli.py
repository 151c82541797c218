"""The command line of `shards`."""

import concurrent.futures
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.augment import Augmentation, RandomResizedCrop
from pipelines.bad_samples.limits import MAX_PIXELS
from pipelines.config import DataConfig
from pipelines.mix import MixConfig
from pipelines.printable import printable_text
from tools.augmentation_lists import AUGMENTATION_LISTS
from tools.cli import run_command
from tools.parse import parse
from tools.shards.build import RejectedError
from tools.shards.shape import Format, Level

DESCRIPTION = """Converts image collections to WebDataset shards, and checks, indexes and displays shards.

Exit status: 0 success; 1 failure during the work, for example a full disk or a killed worker (run the same command again to
continue); 2 mistake in the command or its input, reported in one line; 3 bad samples, found by verify or convert --strict; 130
interrupted."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a collection of images to the shards of one split.

    SRC is one of: a folder with one folder per class; a folder of images with --labels; ImageNet's tar of class tars; a tar of
    class folders; a flat tar with --labels; WebDataset shards (a folder or a pattern of tars); Parquet files in the layout of
    Hugging Face. The samples are shuffled once over the whole set. The bytes of the images are copied unchanged unless --resize
    or --format requires otherwise. To continue an interrupted conversion, run the same command again.
    """

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Folder, tar, Parquet file, or a pattern of tars or Parquet files."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder or s3:// or gs:// prefix of the data set. It receives NAME-000000.tar, NAME-000000.idx, ... and _info.json."""
    name: str = "train"
    """Name of the split. train.py reads the splits 'train' and 'valid'. All splits of one DST share their classes."""
    splits: bool = False
    """Convert all splits in SRC as train, valid and test: folders such as train/ and val/, or files such as train-*.tar."""
    shard_samples: int | None = None
    """Number of samples per shard, 1000 by default. A shard has fewer if some of its samples are rejected."""
    shard_bytes: str | None = None
    """Maximum size of a shard, for example 256MB or 1GiB, instead of --shard-samples. Images count with their size in SRC."""
    seed: int = 0
    """Seed of the shuffle."""
    labels: Path | None = None
    """File with lines of image path and class (CSV, TSV, or other separators), or one class per line for the sorted images."""
    class_names: Path | None = None
    """File with two columns: the label as in --labels, and the class name."""
    label_key: str | None = None
    """Key of the label in .json (a.b if nested), or X.json:KEY, or a member X.cls; or column of Parquet. See docs/shards.md."""
    class_file: str = ""
    """For shards: file of class names, one per line by number. By default: _info.json beside them, or the sorted labels."""
    image_key: str | None = None
    """Extension of the image in each sample of shards, such as input.jpg; or column of Parquet files, by default image."""
    source: Literal["auto", "folders", "tar", "webdataset", "parquet"] = "auto"
    """Kind of SRC, if it is not recognized."""
    resize: int | None = None
    """Shrink the shorter side of images to this number of pixels, with antialiasing. Smaller images stay as they are."""
    quality: int = 90
    """Quality of re-encoded images, from 1 to 100."""
    format: Format = "keep"
    """Format of the stored images. What training cannot decode (GIF, AVIF) is always re-encoded, by default as JPEG."""
    check: Level = "decode"
    """decode: Decode every image completely. structure: Read only the header and the end mark. none: Trust the file name."""
    max_pixels: int = MAX_PIXELS
    """Reject images with more pixels, as their header states them. Default: Pillow's limit. train.py has --data.max-pixels."""
    strict: bool = False
    """Stop at the first rejected image, with exit status 3."""
    workers: int | None = None
    """Number of processes. By default there is one per CPU."""
    executor: str | None = None
    """Address of a Dask scheduler (tcp://HOST:8786) whose workers build the shards instead. They need access to SRC and DST."""
    scratch: Path | None = None
    """Folder where Parquet files are unpacked. By default this is a folder in DST."""
    overwrite: bool = False
    """Start over, and replace the split if it exists."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> int:
        from tools.shards.convert import convert
        from tools.shards.plan import Options, parse_bytes
        from tools.shards.shape import Shape
        from tools.shards.sources.recognize import SourceOptions

        options = Options(
            seed=self.seed,
            shard_samples=self.shard_samples,
            shard_bytes=None if self.shard_bytes is None else parse_bytes(self.shard_bytes),
            shape=Shape(
                check=self.check, resize=self.resize, quality=self.quality, format=self.format, max_pixels=self.max_pixels
            ),
        )
        for name, source in self._sources().items():
            summary = convert(
                source,
                self.dst,
                replace(options, name=name),
                source_options=SourceOptions(
                    self.source, self.labels, self.class_names, self.label_key, self.image_key, self.class_file
                ),
                num_workers=self.workers,
                scheduler=self.executor,
                scratch=self.scratch,
                overwrite=self.overwrite,
                strict=self.strict,
            )
            print(summary.to_json() if self.json else printable_text(str(summary)), flush=True)
        return 0

    def _sources(self) -> dict[str, str]:
        """Returns the source of each split to convert, by the name of the split."""
        from tools.shards.convert import check_locations
        from tools.shards.sources.splits import find_splits

        if not self.splits:
            return {self.name: self.src}
        for option, is_given in (("--name", self.name != Convert.name), ("--labels", self.labels is not None)):
            if is_given:
                raise ValueError(f"{option} is for one split, and --splits for all; give one of the two options")
        found = find_splits(self.src)
        if not found.sources:
            check_locations(self.src, self.dst)
            problem = "no splits found" if os.path.isdir(self.src) else "no such folder"
            needed = "folders like train/ and val/ of class folders or shards, or files like train-000000.tar"
            raise ValueError(f"{self.src}: {problem}; --splits needs {needed}")
        for folder in found.flat:
            print(printable_text(f"warning: {folder} has no class folders and is not converted"), file=sys.stderr)
        return found.sources


@dataclass(frozen=True, kw_only=True)
class _ReadShards:
    """The options of the verbs that read shards."""

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder, glob, brace pattern or tar. Shards from other tools are accepted, too."""
    index_dir: str = ""
    """Folder of index files. They take precedence over those beside the tars."""
    image_key: str = ""
    """Extension of the image in each sample, such as input.jpg. By default any extension of an image."""
    label_key: str = ""
    """Key of the label in each sample's .json (a.b if nested), or X.json:KEY, or a member X.cls. By default the .cls."""
    class_file: str = ""
    """File of class names, one per line in the order of their numbers."""


@dataclass(frozen=True, kw_only=True)
class Info(_ReadShards):
    """Show the contents of a data set: classes and their balance, sizes and formats of the images, bytes to read."""

    json: bool = False
    """Print one JSON object. docs/shards.md describes its keys."""
    sample: int = 20_000
    """Number of images whose headers are read for sizes and formats. They are evenly spaced over the data set."""
    workers: int | None = None
    """Number of processes. By default there is one for a small data set, and one per CPU otherwise."""

    def run(self) -> int:
        from tools.shards.info import as_json, as_text, collect

        splits = collect(
            self.shards,
            index_dir=self.index_dir,
            label_key=self.label_key,
            class_file=self.class_file,
            image_key=self.image_key,
            sample=self.sample,
            num_workers=self.workers,
        )
        print(as_json(splits) if self.json else printable_text(as_text(splits)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Preview(_ReadShards):
    """Draw a contact sheet: samples as they are stored, and as training and validation present them to the model."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Picture to write, .png or .jpg."""
    split: str = "train"
    """Split to show, if SHARDS is a folder with several."""
    samples: int = 8
    """Number of rows. The split is divided into this many equal parts, and each row shows a random sample of one part."""
    views: int = 6
    """Number of random training views of each sample."""
    image_size: int = 224
    """Side of the images that the network receives, in pixels."""
    seed: int = 0
    """Seed of the choice of samples and of the augmentation."""
    crop: RandomResizedCrop = DataConfig.crop
    augment: tuple[Augmentation, ...] = DataConfig.augment
    """Augmentations of training images after the crop, in this order, as in train.py --data.augment. The list may be empty."""
    mix: MixConfig = MixConfig()

    def run(self) -> int:
        from tools.shards.preview import preview

        print(preview(**vars(self)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify(_ReadShards):
    """Find what would disturb training: damaged tars and images, wrong index files, labels and counts.

    The command changes nothing unless --quarantine is given, which writes index files without the bad samples. Tars are never
    changed.
    """

    check: Level = "decode"
    """decode: Decode images completely. structure: Read header and end only, many times faster. none: Do not read images."""
    max_pixels: int = MAX_PIXELS
    """Report images with more pixels, as their header states them. Default: Pillow's limit. train.py has --data.max-pixels."""
    workers: int | None = None
    """Number of processes. By default there is one per CPU."""
    quarantine: bool = False
    """Write index files without the bad samples, into --index-dir if it is given."""
    known: tuple[Path, ...] = ()
    """Run folders, or the quarantine.jsonl files in them. Samples that those runs left out are reported, too."""
    json: bool = False
    """Print one JSON object with all findings."""

    def run(self) -> int:
        from tools.shards.verify import verify

        report = verify(
            self.shards,
            level=self.check,
            max_pixels=self.max_pixels,
            num_workers=self.workers,
            quarantine=self.quarantine,
            index_dir=Path(self.index_dir) if self.index_dir else None,
            label_key=self.label_key,
            class_file=self.class_file,
            image_key=self.image_key,
            known=self.known,
        )
        print(report.to_json() if self.json else printable_text(str(report)))
        return 3 if report.findings else 0


@dataclass(frozen=True, kw_only=True)
class Index:
    """Write the index files that DALI needs to read tars, for tars from other tools."""

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder, glob, brace pattern or tar, or the URL of one of these, for example s3://bucket/train-*.tar."""
    index_dir: Path | None = None
    """Folder for the index files, for --data.index-dir of train.py. By default they are written beside the tars."""
    overwrite: bool = False
    """Replace index files that differ from the contents of their tar."""
    workers: int | None = None
    """Number of processes, by default one per CPU. For remote tars this is the number of threads, by default 16."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from tools.shards.index import index_shards

        report = index_shards(self.shards, index_dir=self.index_dir, overwrite=self.overwrite, num_workers=self.workers)
        print(report.to_json() if self.json else printable_text(str(report)), flush=True)
        for error in report.errors:
            print(printable_text(f"error: {error}"), file=sys.stderr)
        return 2 if report.errors else 0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Draw the embedded image set, ten kinds of figures, and convert it to shards."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder or s3:// or gs:// prefix of the data set."""
    train_samples: int = 2000
    """Number of training images."""
    valid_samples: int = 500
    """Number of validation images."""
    seed: int = 0
    """Seed of the drawing and of the shuffle."""
    overwrite: bool = False
    """Replace the splits if they exist."""

    def run(self) -> int:
        from tools.shards.demo import make_demo

        for summary in make_demo(**vars(self)):
            print(summary, flush=True)
        return 0


Verb = Convert | Info | Preview | Verify | Index | Demo


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits. `shards --help` and docs/shards.md list the exit statuses."""
    run_command(
        lambda: _run(arguments), interrupted="interrupted; to continue an interrupted `convert`, run the same command again"
    )


def _run(arguments: Sequence[str] | None) -> int:
    try:
        verb: Verb = parse(
            lambda words: tyro.cli(Verb, prog="shards", description=DESCRIPTION, args=words, registry=AUGMENTATION_LISTS),
            arguments,
        )
        return verb.run()
    except RejectedError as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 3
    except concurrent.futures.BrokenExecutor:
        message = "a worker process was killed, perhaps for lack of memory; run the same command again to continue"
        print(f"error: {message}", file=sys.stderr)
        return 1
