"""Parses command lines, and explains the mistakes that tyro's messages hide: unknown options and unquoted patterns."""

import collections
import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pipelines.location import URL_SCHEMES
from pipelines.printable import printable
from tools.cli import command_line

Parsed = TypeVar("Parsed")


def parse(read: Callable[[list[str]], Parsed], arguments: Sequence[str] | None) -> Parsed:
    """Parses the words of the command line, or those given.

    tyro takes an unknown option for the value of a positional argument, and then says that the argument has no value.

    Args:
        read: Calls `tyro.cli` with these words and returns its result. It must not do anything else, because it is called again
            for the help text after a mistake, and what it writes to stderr appears only after it has returned.
        arguments: The words, or None.

    Raises:
        ValueError: An option or a verb is unknown, a pattern was not quoted, a local path is a URL, or a check of the options
            refuses a value.
        SystemExit: After `--help`, or after another mistake, which was reported.
    """
    words = command_line(arguments)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = read(words)
    except SystemExit as end:
        if refusal := _find_refusal(end):
            raise refusal from None
        if end.code == 2 and (mistake := _find_mistake(read, words, errors.getvalue())):
            raise ValueError(mistake) from end
        sys.stderr.write(errors.getvalue())
        raise
    sys.stderr.write(errors.getvalue())
    _refuse_urls(parsed)
    return parsed


def _refuse_urls(value: object) -> None:
    """Raises a `ValueError` if a path among the values of a command line is a URL. As a path, it would name a folder `s3:`."""
    if isinstance(value, Path) and (url := re.match(rf"({'|'.join(URL_SCHEMES)}):/", str(value))):
        raise ValueError(f"{url[0]}/{str(value)[url.end() :]}: a file or folder of this machine is needed here, not a URL")
    if isinstance(value, functools.partial):
        _refuse_urls((*value.args, *value.keywords.values()))
    elif isinstance(value, tuple):
        for entry in value:
            _refuse_urls(entry)
    elif dataclasses.is_dataclass(value):
        _refuse_urls((*vars(value).values(),))


def _find_refusal(end: SystemExit) -> ValueError | None:
    """Returns the error of a check of the options, which tyro prints in a frame of its own; None if tyro itself found it."""
    error = end.__context__
    while error is not None and type(error) is not ValueError:
        error = error.__context__
    if error is None:
        return None
    frame, _ = [*traceback.walk_tb(error.__traceback__)][-1]
    return None if frame.f_globals["__name__"].partition(".")[0] == "tyro" else error


def _find_mistake(read: Callable[[list[str]], object], words: Sequence[str], message: str) -> str:
    """Returns what is wrong with the words, or nothing if tyro's message tells it."""
    before_dashes = list(words[: words.index("--")] if "--" in words else words)
    verb: list[str] = []
    program, verbs, options = _read_help(read, verb)
    if verbs:
        verb = before_dashes[:1]
        if not verb:
            return ""
        if verb[0].startswith("-"):
            return f"{program} needs a verb before {printable(verb[0])}: {', '.join(verbs)}"
        if verb[0] not in verbs:
            return f"{program} has no verb {printable(verb[0])}{hint(verb[0], verbs)}; it has {', '.join(verbs)}"
        program, _, options = _read_help(read, verb)
    given = [word.partition("=")[0] for word in before_dashes if re.match(r"--?[A-Za-z]", word)]
    unknown = [option for option in given if option.replace("_", "-") not in options]
    if unknown:
        named = ", ".join(f"{printable(option)}{hint(option, options)}" for option in dict.fromkeys(unknown))
        return f"{program} has no option {named}; {program} --help lists its options"
    surplus = [word for word in words[len(verb) :] if not word.startswith("-")]
    return _about_surplus(program, surplus) if "Unrecognized" in message else ""


def _read_help(read: Callable[[list[str]], object], verb: list[str]) -> tuple[str, list[str], list[str]]:
    """Returns the name of the command with the verb, its verbs, and its options, as the help text lists them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        read([*verb, "--help"])
    usage, *lines = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).split("\n") or [""]
    verbs = re.search(r"\{([\w,-]+)\}", usage)
    heads = [found[0] for line in lines if (found := re.match(r"[│|\s]*-.*?(?=  |$)", line))]
    options = [option for head in heads for option in re.findall(r"(?<![\w.-])--?[A-Za-z][\w.-]*", head)]
    return re.sub(r"usage: | \[.*| \{.*", "", usage).strip(), verbs[1].split(",") if verbs else [], options


def hint(word: str, known: Sequence[str]) -> str:
    """Returns a question for the known word that is most like a word, or nothing."""
    plain = word.lstrip("-").replace("_", "-")
    names = {name.lstrip("-").replace("_", "-"): name for name in known}
    ends = [name for name in names if name.rpartition(".")[2] == plain]
    begins = sorted((name for name in names if name.startswith(plain)), key=len)
    found = [*ends, *begins, *difflib.get_close_matches(plain, names, 1)]
    return f" (did you mean {names[found[0]]}?)" if found else ""


def _about_surplus(program: str, words: Sequence[str]) -> str:
    """Returns what to do about more words than the command takes."""
    files = [word for word in words if os.path.exists(word)]
    endings = collections.Counter(os.path.splitext(file)[1] for file in files if os.path.isfile(file))
    ending, count = endings.most_common(1)[0] if endings else ("", 0)
    if count > 1:
        same = [file for file in files if os.path.splitext(file)[1] == ending]
        begin = os.path.commonprefix([file.removesuffix(ending) for file in same])  # noqa: RUF071  # of letters, not of folders
        pattern = shlex.quote(f"{begin}*{ending}")
        return f"{count:,} {ending or 'other'} files are too many for {program}; put the pattern in quotes: {pattern}"
    folders = [file for file in files if os.path.isdir(file)]
    parents = {os.path.dirname(folder.rstrip("/")) for folder in folders[:-1]}
    if len(folders) > 2 and len(parents) == 1:
        return f"{len(folders):,} folders are too many for {program}; name the folder that holds them: {parents.pop() or '.'}"
    return f"{program} takes fewer words: {printable(' '.join(words))}; names with blanks need quotes"
