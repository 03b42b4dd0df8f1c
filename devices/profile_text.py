"""The text of a shipped device profile: YAML with a figure a line and prices a kind a line, for people to read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def as_yaml(tree: Mapping[str, Any], about: str) -> str:
    """Writes a profile's text: a figure a line, prices a kind a line."""
    lines = [f"# {about}. Made by `fedsim devices build`; change devices/catalogue.yaml or the tables instead."]
    _write(tree, lines, 0)
    return "\n".join(lines) + "\n"


def _write(tree: Mapping[str, Any], lines: list[str], depth: int) -> None:
    for key, value in tree.items():
        plain = re.fullmatch(r"[\w.@-]+", str(key)) and not str(key)[0].isdigit()
        pad, word = "  " * depth, key if plain else f'"{key}"'
        if isinstance(value, Mapping) and not (set(value) <= {"value", "provenance", "source"} or _flat(value)):
            lines.append(f"{pad}{word}:")
            _write(value, lines, depth + 1)
        else:
            lines.append(f"{pad}{word}: {_inline(value)}")


def _flat(value: Mapping[str, Any]) -> bool:
    return len(value) <= 1 and not any(isinstance(v, Mapping) for v in value.values())


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[a-z_]+", value) else '"' + value.replace('"', "'") + '"'
    if isinstance(value, float):
        return f"{value:.6g}" if "e" not in f"{value:.6g}" else f"{value:.10f}".rstrip("0")
    return str(value)
