"""Words for a command's arguments in an error."""

from __future__ import annotations

import re
from pathlib import Path

from devices.texts import VALUE_LETTERS, visible


def shortened(text: str, arguments: list[str]) -> str:
    """Cuts short what was typed at great length, so that the end of a parser's sentence can be read."""
    for argument in arguments:
        for typed in (argument, argument.partition("=")[2], *argument.split("=")):
            if len(typed) > VALUE_LETTERS:
                for said in (typed, repr(typed)[1:-1]):
                    text = text.replace(said, visible(said, VALUE_LETTERS))
    return text


def argument_naming(path: str, arguments: list[str]) -> str:
    """Returns the argument that names a path, with its option, as a sentence shows it; empty where none does."""
    before = ""
    for argument in arguments:
        option, _, value = argument.partition("=") if argument.startswith("-") else (before, "", argument)
        if any(part and part in Path(path).parts for part in (value, *re.split("[/:]", value), f"{value}.yaml")):
            return visible(f"{option}={value}" if option.startswith("-") else value, VALUE_LETTERS)
        before = argument
    return ""
