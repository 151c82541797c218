"""The command line of `shards`."""

import concurrent.futures
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.augment import RandomResizedCrop
from pipelines.config import DataConfig
from pipelines.mix import MixConfig
from pipelines.notation import AugmentationList
from tools.cli import run_command
from tools.shards.errors import RejectedError

DESCRIPTION = """Image collections in, WebDataset shards out.

Exit status: 0 done; 1 failed on the way (a full disk, a worker that was killed), where the same command goes on; 2 a mistake
in the command or its input, said in one line; 3 bad samples were found (by verify, or by convert --strict); 130 interrupted."""


@dataclass(frozen=True)
class Convert:
    """Turn a collection of images into the shards of one split.

    SRC is a folder with one folder a class; or a folder with a list of classes as --labels; or ImageNet's tar of class tars, a
    tar of class folders, a flat tar with --labels; or WebDataset shards (a folder or a pattern of tars); or Parquet files as
    Hugging Face lays them out. Samples are shuffled once over the whole set; the images' bytes are copied unchanged unless
    --resize or --format asks for more. A conversion that was interrupted goes on when the same command is run again.
    """

    src: tyro.conf.Positional[str]
    """Folder, tar, Parquet file, or a pattern of tars or Parquet files."""
    dst: tyro.conf.Positional[str]
    """Folder or s3:// or gs:// prefix of the data set; gets NAME-000000.tar, NAME-000000.idx, ... and _info.json."""
    name: str = "train"
    """Name of the split: 'train' and 'valid' are what train.py looks for. Splits of one DST share their classes."""
    shard_samples: int | None = None
    """Samples planned for a shard: 1000 by default. Those that are left out make it shorter."""
    shard_bytes: str | None = None
    """Instead: largest size of a shard, as in 256MB or 1GiB, counting images as they are in SRC."""
    seed: int = 0
    """Seed of the shuffle."""
    labels: Path | None = None
    """CSV, TSV or blank-separated file of image path and class; or a class a line, for the images in sorted order."""
    class_names: Path | None = None
    """File of two columns, label as --labels has it and class name."""
    label_key: str | None = None
    """Where the label is: the key in a shard's .json (a.b for nested ones), or the column of a Parquet file. By default it is
    'label', and a shard's .cls comes first."""
    class_file: str = ""
    """For shards: file of class names, one a line in the order of their numbers; by default those beside them, or sorted."""
    image_key: str = "image"
    """The column of a Parquet file that has the images."""
    source: Literal["auto", "folders", "tar", "webdataset", "parquet"] = "auto"
    """What SRC is, where it is not recognized."""
    resize: int | None = None
    """Shrink images to this length of the shorter side, pixels, antialiased; smaller ones stay as they are."""
    quality: int = 90
    """Of images that are encoded anew, 1 to 100."""
    format: Literal["keep", "jpeg", "webp"] = "keep"
    """Format of the stored images. What training cannot decode (GIF, AVIF) becomes JPEG in any case."""
    check: Literal["decode", "structure", "none"] = "decode"
    """decode: every image, completely. structure: header and end mark only. none: the file's name is trusted."""
    strict: bool = False
    """Stop at the first image that has to be left out, with exit status 3."""
    workers: int | None = None
    """Processes; by default one a CPU."""
    executor: str | None = None
    """Address of a Dask scheduler, tcp://HOST:8786, whose workers build the shards instead. They must see SRC and DST."""
    scratch: Path | None = None
    """Where Parquet files are unpacked; in DST by default."""
    overwrite: bool = False
    """Begin anew, replacing the split if it is there already."""
    json: bool = False
    """Print the summary as JSON."""

    def run(self) -> int:
        from tools.shards.convert import convert
        from tools.shards.plan import Options, parse_bytes
        from tools.shards.shape import Shape
        from tools.shards.sources import SourceOptions

        summary = convert(
            self.src,
            self.dst,
            Options(
                name=self.name,
                seed=self.seed,
                shard_samples=self.shard_samples,
                shard_bytes=None if self.shard_bytes is None else parse_bytes(self.shard_bytes),
                shape=Shape(check=self.check, resize=self.resize, quality=self.quality, format=self.format),
            ),
            source_options=SourceOptions(
                self.source, self.labels, self.class_names, self.label_key, self.image_key, self.class_file
            ),
            num_workers=self.workers,
            scheduler=self.executor,
            scratch=self.scratch,
            overwrite=self.overwrite,
            strict=self.strict,
        )
        print(summary.to_json() if self.json else summary)
        return 0


@dataclass(frozen=True)
class Info:
    """Show what a data set holds: classes and their balance, sizes and formats of the images, bytes to read."""

    shards: tyro.conf.Positional[str]
    """Folder, glob, brace pattern or tar; also of shards that something else has written."""
    json: bool = False
    """Print one JSON object; docs/data-format.md has its keys."""
    index_dir: str = ""
    """Folder of index files that are taken before those beside the tars."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested ones. Without it the label is the sample's .cls."""
    class_file: str = ""
    """File of class names, one a line in the order of their numbers."""
    sample: int = 20_000
    """Images whose headers are read for sizes and formats, evenly spaced over the data set."""
    workers: int | None = None
    """Processes. By default one for a small data set, one a CPU for others."""

    def run(self) -> int:
        from tools.shards.info import as_json, as_text, collect

        splits = collect(
            self.shards,
            index_dir=self.index_dir,
            label_key=self.label_key,
            class_file=self.class_file,
            sample=self.sample,
            num_workers=self.workers,
        )
        print(as_json(splits) if self.json else as_text(splits))
        return 0


@dataclass(frozen=True)
class Preview:
    """Draw a contact sheet: samples as they are stored, and as training and validation show them to the model."""

    shards: tyro.conf.Positional[str]
    """Folder, glob, brace pattern or tar."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Picture to write, .png or .jpg."""
    split: str = "train"
    """Split to show, where SHARDS is a folder with several."""
    index_dir: str = ""
    """Folder of index files that are taken before those beside the tars."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested ones. Without it the label is the sample's .cls."""
    class_file: str = ""
    """File of class names, one a line in the order of their numbers."""
    samples: int = 8
    """Rows: samples, drawn at random in equal distances."""
    views: int = 6
    """Random training views of each sample."""
    image_size: int = 224
    """Side of the images that the network sees, pixels."""
    seed: int = 0
    """Seed of the choice of samples and of the augmentation."""
    crop: RandomResizedCrop = DataConfig.crop
    augment: AugmentationList = DataConfig.augment
    """What happens to training images after the crop, in this order; may be empty. As train.py's --data.augment."""
    mix: MixConfig = MixConfig()

    def run(self) -> int:
        from tools.shards.preview import preview

        print(
            preview(
                self.shards,
                self.output,
                split=self.split,
                index_dir=self.index_dir,
                label_key=self.label_key,
                class_file=self.class_file,
                num_samples=self.samples,
                num_views=self.views,
                image_size=self.image_size,
                seed=self.seed,
                crop=self.crop,
                augmentations=self.augment,
                mix_config=self.mix,
            )
        )
        return 0


@dataclass(frozen=True)
class Verify:
    """Look for what would disturb training: damaged tars and images, wrong indices, labels and counts.

    Findings do not change anything, unless --quarantine writes index files without the bad samples; tars are never written to.
    """

    shards: tyro.conf.Positional[str]
    """Folder, glob, brace pattern or tar; also of shards that something else has written."""
    check: Literal["decode", "structure", "none"] = "decode"
    """decode: every image completely. structure: its header and end, many times faster. none: images are not looked at."""
    workers: int | None = None
    """Processes; by default one a CPU."""
    quarantine: bool = False
    """Write index files that leave the bad samples out."""
    index_dir: Path | None = None
    """Folder of index files that are taken before those beside the tars; --quarantine writes them there."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested ones. Without it the label is the sample's .cls."""
    class_file: str = ""
    """File of class names, one a line in the order of their numbers."""
    known: tuple[Path, ...] = ()
    """Files quarantine.jsonl of runs, or the runs' folders: samples that training has left out are findings, too."""
    json: bool = False
    """Print one JSON object with all findings."""

    def run(self) -> int:
        from tools.shards.verify import verify

        report = verify(
            self.shards,
            level=self.check,
            num_workers=self.workers,
            quarantine=self.quarantine,
            index_dir=self.index_dir,
            label_key=self.label_key,
            class_file=self.class_file,
            known=self.known,
        )
        print(report.as_json() if self.json else report)
        return 3 if report.findings else 0


@dataclass(frozen=True)
class Index:
    """Write the index files that DALI reads tars by, for tars that something else has written."""

    shards: tyro.conf.Positional[str]
    """Folder, glob, brace pattern or tar; or the URL of one of these, as in s3://bucket/train-*.tar."""
    index_dir: Path | None = None
    """Folder for the index files, for train.py --data.index-dir; by default they lie beside the tars."""
    overwrite: bool = False
    """Replace index files that differ from what their tar holds."""
    workers: int | None = None
    """Processes; by default one a CPU. For remote tars threads; by default 16."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from tools.shards.index import index_shards

        report = index_shards(self.shards, index_dir=self.index_dir, overwrite=self.overwrite, num_workers=self.workers)
        print(report.as_json() if self.json else report, flush=True)
        for error in report.errors:
            print(f"error: {error}", file=sys.stderr)
        return 2 if report.errors else 0


@dataclass(frozen=True)
class Demo:
    """Draw the embedded image set, ten kinds of figures, and convert it to shards."""

    dst: tyro.conf.Positional[Path]
    """Folder of the data set."""
    train_samples: int = 2000
    """Images to train on."""
    valid_samples: int = 500
    """Images to validate with."""
    seed: int = 0
    """Seed of the drawing and of the shuffle."""
    overwrite: bool = False
    """Replace the splits if they are there already."""

    def run(self) -> int:
        from tools.shards.demo import make_demo

        for summary in make_demo(
            self.dst,
            train_samples=self.train_samples,
            valid_samples=self.valid_samples,
            seed=self.seed,
            overwrite=self.overwrite,
        ):
            print(summary, flush=True)
        return 0


Command = (
    Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Preview, tyro.conf.subcommand("preview")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit statuses are listed in docs/shards.md and by `shards --help`."""
    run_command(
        lambda: _run(arguments), interrupted="interrupted; what `convert` has done so far is kept for when it is run again"
    )


def _run(arguments: Sequence[str] | None) -> int:
    try:
        verb: Convert | Info | Preview | Verify | Index | Demo = tyro.cli(
            Command, prog="shards", description=DESCRIPTION, args=arguments
        )
        return verb.run()
    except RejectedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except concurrent.futures.BrokenExecutor:
        print("error: a worker process was killed, perhaps for lack of memory; the same command goes on", file=sys.stderr)
        return 1
