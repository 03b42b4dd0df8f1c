"""Reads what the source of a class says about it, without importing it or anything else."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import fedsim

MAX_ABOVE = 12  # classes that one is followed up to
SOURCE = re.compile(r"\bSources?:\s+(.+?)(?=\n\s*\n|\s+Records:|\s+State:|$)", re.DOTALL)  # to the end of its paragraph
RECORDS = re.compile(
    r"\bRecords(?:, beside the weights)?:\s+(?!none\b)(.+?)(?=\s+State:|$)", re.DOTALL
)  # of the docstring
SAID = re.compile(r"\bRecords(?:, beside the weights)?:\s")  # be it that there are none
SEE = re.compile(r"Records:\s+see\s+`([\w.]+)`")
SHIPPED = ("clients", "strategies", "flwr")  # whose halves without records send none
BESIDE = str(Path(fedsim.__file__).resolve().parent.parent)  # our other packages are beside fedsim


@dataclass(frozen=True)
class Written:
    """What is written about a class or function.

    Attributes:
        module: its module's docstring.
        text: its own docstring, as far as its arguments.
        arguments: what is said of each.
    """

    module: str
    text: str
    arguments: dict[str, str]


def written_about(target: str) -> list[Written]:
    """Returns what is written about a class, then about those above it; nothing where its source is not found."""
    return [_written(tree, node) for tree, node in _with_those_above(target)]


def source_of(found: list[Written]) -> str:
    """Returns the paper that a class follows; empty where neither it nor its module names one."""
    texts = [text for written in found[:1] for text in (written.text, written.module)]
    return next((" ".join(source[1].split()) for text in texts if (source := SOURCE.search(text))), "")


def records_of(found: list[Written]) -> str:
    """Returns what a class sends beside the weights, as its module or that of a class above it says; or nothing."""
    for written in found:
        see = SEE.search(written.module)
        for text in (_docstring(see[1]) if see else written.module, written.text):
            if records := RECORDS.search(text):
                return records[1] if "\n\n" in records[1] else " ".join(records[1].split())
    return ""


def says_records(target: str, found: list[Written]) -> bool:
    """Returns whether it is known if a class sends more than the weights: of those shipped, and where its text says it.

    Args:
        target: name of the class with its module.
        found: what is written about it and those above it.
    """
    return target.split(".")[0] in SHIPPED or any(SAID.search(w.module) or SAID.search(w.text) for w in found)


def _docstring(module: str) -> str:
    tree = _tree(module)
    return (ast.get_docstring(tree) or "") if tree else ""


def _written(tree: ast.Module, node: ast.ClassDef | ast.FunctionDef) -> Written:
    text, _, rest = (ast.get_docstring(node) or "").partition("Args:\n")
    arguments: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + re.split(r"\n(?=\S)", rest)[0]):
        names, colon, meaning = " ".join(entry.split()).partition(": ")
        if colon:
            arguments |= dict.fromkeys(names.split(", "), meaning)
    return Written(ast.get_docstring(tree) or "", inspect.cleandoc(text), arguments)


def _with_those_above(target: str) -> Iterator[tuple[ast.Module, ast.ClassDef | ast.FunctionDef]]:
    left = [target]
    for _ in range(MAX_ABOVE):
        if not left:
            return
        module, _, name = left.pop(0).rpartition(".")
        if (tree := _tree(module)) is None:
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                yield tree, node
                bases = node.bases if isinstance(node, ast.ClassDef) else []
                homes = _homes(tree)
                names = [base.id for base in bases if isinstance(base, ast.Name)]
                left += [f"{homes.get(name, module)}.{name}" for name in names]


def _homes(tree: ast.Module) -> dict[str, str]:
    """Returns the modules that a module takes names from."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: node.module for alias in node.names}
    return found


@lru_cache(maxsize=256)
def _tree(module: str) -> ast.Module | None:
    """Returns the syntax of a module, found by its name as an import would find it, but not imported."""
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    for folder in (BESIDE, *sys.path):
        place = Path(folder or ".").joinpath(*module.split("."))
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                try:
                    return ast.parse(file.read_bytes())
                except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
                    return None
    return None
