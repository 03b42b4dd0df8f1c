"""Forms of what a run writes as JSON, to refuse a damaged or foreign file in one sentence before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from devices.errors import FileError

MAX_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True)
class Form:
    """Says what a value must be.

    Attributes:
        text: how the sentence says it.
        fits: the test.
        optional: it may be missing.
    """

    text: str
    fits: Callable[[Any], bool]
    optional: bool = False


Forms = Mapping[str, "Form | Mapping[str, Any]"]


def optional(form: Form) -> Form:
    """Returns the same form, for what may be missing."""
    return Form(form.text, form.fits, True)


def maps_of(form: Form) -> Form:
    """Returns the form of a map from names to values of another form."""

    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and form.fits(v) for k, v in value.items())

    return Form(f"a map of {form.text}", fits)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _all(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(test, value))


WHOLE = Form("a whole number", _is_whole)
NUMBER = Form("a number", _is_number)
FIGURE = Form("a number or null", lambda value: value is None or _is_number(value))
TEXT = Form("text", lambda value: isinstance(value, str))
FLAG = Form("true or false", lambda value: isinstance(value, bool))
NAME = Form("text or null", lambda value: value is None or isinstance(value, str))
TEXTS = Form("a list of texts", lambda value: _all(value, lambda v: isinstance(v, str)))
INTEGERS = Form("a list of whole numbers", lambda value: _all(value, _is_whole))
MAP = Form("a map", lambda value: isinstance(value, dict))
MAPS = Form("a list of maps", lambda value: _all(value, lambda v: isinstance(v, dict)))
NUMBERS = maps_of(FIGURE)


# What a run was made of, in its settings.
CHOSEN: Forms = dict.fromkeys(("workload", "fleet", "strategy", "trainer", "engine"), TEXT)
# The metric that its models are judged by, where that is not accuracy.
METRIC: Forms = {"primary": {"name": TEXT, "unit": TEXT, "higher_is_better": FLAG}}


def check_tree(tree: Any, forms: Forms, where: str) -> None:
    """Refuses a tree that lacks a key or holds a value of another form.

    Args:
        tree: of maps, lists and values.
        forms: by key, the form of a value, or those of a map.
        where: names the tree in the sentence.

    Raises:
        FileError: naming the first key that is wrong.
    """
    if not isinstance(tree, dict):
        raise FileError(f"{where} must be a map, got {_shown(tree)}")
    for key, form in forms.items():
        if isinstance(form, Mapping):
            check_tree(tree.get(key), form, f"{where}: {key}")
        elif key not in tree:
            if not form.optional:
                raise FileError(f"{where} lacks {key!r}")
        elif not form.fits(tree[key]):
            raise FileError(f"{where}: {key} must be {form.text}, got {_shown(tree[key])}")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else f"a {'map' if isinstance(value, dict) else 'list'}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
