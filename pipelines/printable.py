"""Makes text from files safe to print: a name may contain bytes that steer a terminal."""


def printable(text: str) -> str:
    r"""Returns the text with control characters as escapes: ESC becomes `\x1b`, and a line break `\n`.

    Use it for every name that comes from a file (of a class, a member, a key, a folder) and goes to a terminal, a log or an
    error message. JSON and HTML have escapes of their own.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def printable_text(text: str) -> str:
    """Returns the same for a text of several lines, whose line breaks stay. Names in it must have gone through `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns `1 tar`, `2 tars`, `1,000 classes`. The plural has an `s` unless it is given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
