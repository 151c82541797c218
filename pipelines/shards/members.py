"""The members of a sample: which is its image and which its label, and what to say if one is missing."""

import contextlib
import io
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from pipelines.printable import printable
from pipelines.remote.object_store import is_url
from pipelines.shards.index import Component, Sample, as_component, split_name
from pipelines.shards.walk import Entry, walk

# Training leaves JPEG 2000 (jp2) out, and says why. Without it here, such a sample would seem to have no image.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "jp2", "pnm", "ppm", "pgm")
MOST_SHOWN = 12  # members of a sample in a message
MOST_LINKS = 3  # links and the like in a message
MOST_CHARACTERS = 100  # of a name in a message


def short(name: str) -> str:
    """Returns the name of a member, a key or an extension for a message: without control characters, and never long."""
    return printable(name if len(name) <= MOST_CHARACTERS else f"{name[:MOST_CHARACTERS]}...")


def image_extensions(image_key: str | None) -> tuple[str, ...]:
    """Returns the extensions of a sample's image, from the option --image-key: that one, or by default all of images."""
    return (image_key.lower().removeprefix("."),) if image_key else IMAGE_EXTENSIONS


def key_of(sample: Sample) -> str:
    """Returns the key that the members of the sample share."""
    return split_name(sample[0].name)[0]


def first_of(sample: Sample, extensions: Sequence[str]) -> Component | None:
    """Returns the first component of a sample with one of the extensions, in either case."""
    return next((component for component in sample if component.extension.lower() in extensions), None)


def image_or_first(sample: Sample, images: Sequence[str] = IMAGE_EXTENSIONS) -> Component:
    """Returns the image of a sample, or its first member if it has no image. Messages name the sample by it."""
    return first_of(sample, images) or sample[0]


def require_members(
    tar: str | Path, sample: Sample, images: Sequence[str], label: str, samples: Iterable[Sample] = ()
) -> tuple[Component, Component]:
    """Returns the image and the label of a sample.

    Args:
        tar: Path of the tar, for the message.
        sample: The sample.
        images: Extensions of images.
        label: Extension of the label.
        samples: All samples of the tar.

    Raises:
        ValueError: It lacks one of them; the message says what to do.
    """
    if (image := first_of(sample, images)) and (found := first_of(sample, (label,))):
        return image, found
    key = key_of(sample)
    same_key = [other for other in samples if key_of(other) == key]
    raise ValueError(f"{tar}: {short(key)}: {lacks_in(str(tar), sample, images, label, same_key)}")


def lacks_in(tar: str, sample: Sample, images: Sequence[str], label: str, same_key: Iterable[Sample]) -> str:
    """Returns what `lacks` says of a sample that an index lists. Names and links are those of the tar, if it is local."""
    if is_url(tar):  # it would take many requests
        return lacks(sample, images, (label,), same_key)
    names, others = _walked(tar, os.stat(tar).st_mtime_ns)
    named = [part if part.offset not in names else as_component(names[part.offset]) or part for part in sample]
    return lacks(named, images, (label,), same_key, others.get(key_of(named), ()))


@lru_cache(maxsize=8)  # asked for each bad sample
def _walked(tar: str, modified: int) -> tuple[dict[int, Entry], dict[str, list[Entry]]]:
    """Returns the files in a tar by offset, and its links and the like by the key of their sample; of a damaged tar, the first.

    A changed tar has another time of modification, so it is read again.
    """
    files: dict[int, Entry] = {}
    others: dict[str, list[Entry]] = {}
    with contextlib.suppress(ValueError), open(tar, "rb") as file:
        for entry in walk(file, tar):
            if entry.other:
                others.setdefault(split_name(entry.name)[0], []).append(entry)
            else:
                files.setdefault(entry.offset, entry)
    return files, others


def lacks(
    sample: Sample,
    images: Sequence[str],
    labels: Sequence[str],
    same_key: Iterable[Sample] = (),
    others: Iterable[Entry] = (),
) -> str:
    """Says what a sample lacks, and what to do about it.

    Args:
        sample: The sample, without an image or without a label.
        images: Extensions of images.
        labels: Extensions of labels; one of them is enough.
        same_key: Samples of the tar with the same key, of which one may be the missing member.
        others: Members of the tar with the key of the sample that have no bytes of their own.
    """
    lacking = []
    if first_of(sample, images) is None:
        lacking.append("no image" if len(images) > 1 else f"no .{short(images[0])}")
    if first_of(sample, labels) is None:
        lacking.append(f"no {' or '.join(f'.{short(label)}' for label in labels)}")
    text = f"{' and '.join(lacking)} among its members, {_shown(sample)}"
    links = [f"{short(entry.name)} is {entry.other}" for entry in itertools.islice(others, MOST_LINKS)]
    if any(" link to " in link for link in links):
        links.append("`tar --dereference --hard-dereference` stores files in place of links")
    hint = "; ".join(links) or _apart(sample, (*images, *labels), same_key) or _way_out(sample, images, labels)
    return f"{text}; {hint}" if hint else text


def _shown(sample: Sample) -> str:
    present = " ".join(f".{short(component.extension)}" for component in sample[:MOST_SHOWN])
    return f"{present} ..." if len(sample) > MOST_SHOWN else present


def _apart(sample: Sample, wanted: Sequence[str], same_key: Iterable[Sample]) -> str:
    """Says that a missing member lies elsewhere in the tar."""
    present = {component.extension.lower() for component in sample}
    for component in itertools.chain.from_iterable(same_key):
        if component.extension.lower() in wanted and component.extension.lower() not in present:
            return (
                f"its .{short(component.extension)} is in the tar, but not next to it; `shards convert` writes new shards "
                "with whole samples"
            )
    return ""


def _way_out(sample: Sample, images: Sequence[str], labels: Sequence[str]) -> str:
    """Says how members are named whose extension has dots, or which option reads the label of a `.json`."""
    dotted = [component.extension.lower() for component in sample if "." in component.extension]
    pictures = dict.fromkeys(extension for extension in dotted if extension.rpartition(".")[2] in IMAGE_EXTENSIONS)
    texts = dict.fromkeys(extension for extension in dotted if extension.endswith((".cls", ".json")))
    if {extension.rpartition(".")[0] for extension in pictures} & {extension.rpartition(".")[0] for extension in texts}:
        return (
            "the key of a sample ends at the first dot of the file name, and here the names have more dots; rename the "
            "files, or write new shards with `shards convert`"
        )
    options = []
    if pictures and first_of(sample, images) is None:
        options.append(f"--image-key {short(next(iter(pictures)))}")
    if texts and first_of(sample, labels) is None:
        text = next(iter(texts))
        options.append(f"--label-key {short(text)}{':KEY' if text.endswith('.json') else ''}")
    if options:
        in_training = " and ".join(option.partition(" ")[0].replace("--", "--data.") for option in options)
        return (
            "the key of a sample ends at the first dot of the file name, and the rest is the extension; "
            f"give {' and '.join(options)} (in training {in_training})"
        )
    if list(labels) == ["cls"] and first_of(sample, ("json",)):
        return "--label-key KEY (in training --data.label-key) reads the label from the .json"
    return ""


def read_member(file: BinaryIO, component: Component, tar: str | Path) -> bytes:
    """Reads the bytes of a member that an index lists.

    Raises:
        ValueError: The tar does not have these bytes, so the index is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    if component.offset + component.size > size:
        raise ValueError(f"{tar}: {not_there(component.offset, component.size)}, where the tar has {size:,} bytes")
    file.seek(component.offset, io.SEEK_SET)
    return file.read(component.size)


def not_there(offset: int, size: int) -> str:
    """Returns the beginning of a message about bytes that an index lists and the tar does not have."""
    return (
        "damaged index, or the index of another tar (`shards index --overwrite` writes it anew); it lists bytes from "
        f"{offset:,} to {offset + size:,}"
    )
