"""Paths and URLs as people write them: `~`, `file:`, and the notations of other tools and systems."""

import os
import re
from urllib.parse import unquote, urlsplit

URL_SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https")  # of storage whose packages `.[remote]` installs
READABLE = "paths, and URLs that begin with s3://, gs:// or http(s)://,"


def expand_location(location: str) -> str:
    """Returns a location with `~` and `file:` resolved. The shell leaves both to us within quotes, and after `=`.

    Raises:
        ValueError: A `file:` URL names another machine, or no absolute path.
    """
    if location.startswith("~"):
        return os.path.expanduser(location)
    if not location.startswith("file:"):
        return location
    url = urlsplit(location.replace("?", "%3F").replace("#", "%23"))  # in a pattern, they are letters of the path
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise ValueError(f"{location}: a file URL is file:// and an absolute path, with three slashes: file:///folder/x.tar")
    return unquote(url.path)


def expand_arguments(arguments: list[str]) -> list[str]:
    """Expands the words of a command line: `PATH`, and the path in `--option=PATH`.

    Raises:
        ValueError: See `expand_location`.
    """
    expanded = []
    for word in arguments:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(option + equals + expand_location(value))
    return expanded


def refuse_other_notations(location: str) -> None:
    """Raises a `ValueError` for a location that cannot be a path here, with what works instead.

    Call it where nothing exists under that name: almost any text may be the name of a file.
    """
    if location.startswith("pipe:"):
        raise ValueError(f"{location}: commands are not run; {READABLE} are read directly")
    if re.match(r"[A-Za-z]:[\\/]|\\\\", location):
        raise ValueError(f"{location}: this is a Windows path; give the path under which this system has the folder")
    scheme, colon, rest = location.partition(":")
    if colon and scheme.lower() in URL_SCHEMES and not location.startswith(f"{scheme.lower()}://"):
        raise ValueError(f"{location}: a URL begins with {scheme.lower()}://, as in {scheme.lower()}://{rest.lstrip('/')}")
