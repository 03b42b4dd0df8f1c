"""Makes texts from outside (names, labels, titles, paths, errors) fit for where they are shown or stored.

A text is data wherever it comes from: a class called `$\frac{$` is no formula, a device called `[/red]` no markup, an
arm called `../x` no path. Pictures have `devices.figures`, the terminal has `fedsim.report.terminal`, and a page
escapes HTML itself.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

ELLIPSIS = "…"
NAME_LETTERS = 40  # of a name in a picture or a table
SENTENCE_LETTERS = 4000  # of an error; a device file may have many faults
VALUE_LETTERS = 120  # of a value in one
FILE_BYTES = 120  # of a file's or folder's name; systems take 255, and others add endings to it
# Names that stand for devices on Windows, where a run folder may be copied to.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
_UNSAFE = re.compile(r"[^\w.@+-]+")


def visible(text: object, most: int | None = None) -> str:
    """Returns the text on one line, shortened, with what cannot be seen written as escapes.

    Control characters, lone surrogates and marks that turn the direction of writing become e.g. `\\x1b`; line breaks
    and tabs become spaces.

    Args:
        text: anything; its `str` is taken.
        most: letters; an ellipsis replaces the end of longer texts.
    """
    letters = str(text)
    if most is not None and len(letters) > 8 * most:
        letters = letters[: 8 * most]  # escapes only make it longer
    shown = letters if letters.isascii() and letters.isprintable() else "".join(map(_visible, letters))
    return shown if most is None or len(shown) <= most else shown[: most - 1].rstrip() + ELLIPSIS


def visible_lines(text: object, most: int | None = None) -> str:
    """Returns a text of several lines, each as `visible` makes it."""
    return "\n".join(visible(line, most) for line in str(text).split("\n"))


def _visible(letter: str) -> str:
    if letter.isascii() and letter.isprintable():
        return letter
    if letter in "\n\r\t":
        return " "
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        # Joiners shape letters of several scripts and emoji: they belong to what is seen.
        return letter if letter in "\u200c\u200d" else letter.encode("unicode_escape", "surrogatepass").decode()
    return letter


def file_name(text: str, default: str = "unnamed") -> str:
    """Makes a name for one file or folder: no separators, no `..`, not empty, not reserved, not too long.

    Names that are fit already stay as they are. A name that had to be cut gets some digits of its hash, so that two
    long names stay two.
    """
    name = _UNSAFE.sub("-", text).strip(".-") or default
    if name.partition(".")[0].lower() in RESERVED:
        name = f"{name}-"
    if len(name.encode()) > FILE_BYTES:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        kept = name.encode()[: FILE_BYTES - len(digest) - 1].decode(errors="ignore")
        name = f"{kept.rstrip('.-')}-{digest}"
    return name


def quoted(value: object) -> str:
    """Writes a value as a sentence shows it: its `repr`, shortened."""
    try:
        return visible(repr(value), VALUE_LETTERS)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"


def as_yaml(value: object) -> str:
    """Writes a value as a config has it: null, true and false are not Python's words for them."""
    text = quoted(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def storable(text: str) -> bool:
    """Returns whether files and tables can hold the text: it has no lone surrogates and no control characters."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)
