"""Says what the options of the groups are, from the comments of their files and the docstrings of their classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from devices.errors import FileError, one_line
from devices.reading import read_text, read_yaml
from fedsim.settings.docstrings import Written, records_of, says_records, source_of, written_about
from fedsim.settings.groups import (
    GROUPS,
    PRESETS,
    PRIMARY,
    check_preset,
    config_folders,
    option_file,
    options,
    target_of,
)
from fedsim.settings.hydra_text import as_hydra

HALVES = ("strategy", "trainer")
OVERRIDE = re.compile(r"override /(\w+)(?:@\S+)?")
MAX_NAMED, NEAR = 3, 0.8  # options in a sentence, and how alike names are that may be meant
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"A-Z])")
FOLLOWS = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,(.*))?\}")
BESIDE = re.compile(r"/(\w+)@(\w+)")  # an option of a group as a setting of another one
HYDRAS = {"_partial_", "_recursive_", "_convert_", "_args_"}
NAMED = re.compile(rf"({'|'.join(GROUPS)})=([\w,.-]+)")


@dataclass(frozen=True)
class Setting:
    """A setting of an option: its whole key, its default as one types it, and what it is."""

    key: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Option:
    """What is said of an option of a group.

    Attributes:
        sentence: what it is.
        source: the paper that it is from; empty where nothing is said.
        notes: what else its file says.
        text: what its class says of itself.
        records: what it sends beside weights, None where the code of a half of a method does not say.
        examples: commands with it.
        target: its class; empty for those that only choose others.
        chooses: options of other groups that it takes.
        settings: its own.
        file: where it is written.
    """

    group: str
    name: str
    sentence: str
    source: str
    notes: str
    text: str
    records: str | None
    examples: tuple[str, ...]
    target: str
    chooses: dict[str, str]
    settings: tuple[Setting, ...]
    file: Path


@dataclass(frozen=True)
class _Head:
    sentence: str
    source: str
    notes: str
    examples: tuple[str, ...]


def describe(group: str, name: str) -> Option:
    """Describes an option that there is.

    Raises:
        FileError: if its file cannot be read.
    """
    file, target = option_file(group, name), target_of(group, name) or ""
    check_preset(group, file)
    head, found = _head(file), written_about(target)
    text = " ".join(found[0].text.split("\n\n")[0].split()) if found else ""
    examples = head.examples or (f"fedsim run {group}={name}",)
    known = {key: meaning for written in reversed(found) for key, meaning in written.arguments.items()}
    settings = [
        s if s.meaning else replace(s, meaning=_from_docstring(s.key.removeprefix(f"{group}."), known))
        for s in _settings(group, name)
    ]
    return Option(
        group,
        name,
        head.sentence or SENTENCE.split(text)[0],
        head.source or source_of(found),
        head.notes,
        text,
        _records(target, found) if group in HALVES else records_of(found),
        examples,
        target,
        _chosen(file),
        tuple(settings),
        file,
    )


def _records(target: str, found: list[Written]) -> str | None:
    """Returns what a half sends beside the weights; None where nobody says whether it does."""
    return records_of(found) if says_records(target, found) else None


def sentence_of(group: str, name: str) -> str:
    """Returns in one sentence what an option is; empty where neither its file nor its class says so."""
    return _head(option_file(group, name)).sentence or describe(group, name).sentence


def settings_of_top() -> list[Setting]:
    """Returns the settings that belong to no group."""
    file = config_folders()[0] / f"{PRIMARY}.yaml"
    found = _leaves(file, "")
    return [Setting(key, default, meaning) for key, (default, meaning) in found.items() if key != "choices"]


def groups_in_words() -> dict[str, str]:
    """Returns what each group chooses."""
    found = {group: text for group, _, text in _groups()}
    return {group: found[group] for group in GROUPS}


def defaults() -> dict[str, str]:
    """Returns the options that a run takes where nothing is said, as far as no other option overrides them."""
    return {group: name for group, name, _ in _groups() if name != "null"}


def _groups() -> list[tuple[str, str, str]]:
    """Returns the groups with their default and what they choose."""
    text = read_text(config_folders()[0] / f"{PRIMARY}.yaml")
    return re.findall(r"^  - (\w+): (\S+) +# (.+)$", text, re.MULTILINE)


def nearest_elsewhere(key: str) -> str:
    """Says which options have a setting that those of a run lack, or one of a near name; empty where none do."""
    having: dict[str, list[str]] = {}
    for group in GROUPS:
        for name in options(group) if group not in PRESETS else ():
            for setting in _settings(group, name):
                having.setdefault(setting.key, []).append(f"{group}={name}")
    last = {own.rpartition(".")[2] for own in having}
    near = {key} if "." in key else {key} & last or set(get_close_matches(key, last, 1, NEAR))
    found = {own: names for own, names in having.items() if own == key or own.rpartition(".")[2] in near}
    if key in found:
        return f"unknown setting {key!r}; it goes with {_listed(found[key])}"
    said = " or ".join(f"{own!r} (with {_listed(names)})" for own, names in found.items())
    return f"unknown setting {key!r}; did you mean {said}?" if said else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def studies_with(group: str, name: str) -> list[str]:
    """Returns the studies that come with fedsim of which an arm takes an option, also by way of an experiment."""
    found = []
    for file in sorted((config_folders()[0] / "study").glob("*.yaml")):
        chosen = {(key, value) for text in _texts(read_yaml(file)) for key, value in _named(text)}
        for key, value in list(chosen):
            chosen |= set(all_chosen(key, value).items()) if key in PRESETS else set()
        if (group, name) in chosen:
            found.append(file.stem)
    return found


def all_chosen(group: str, name: str) -> dict[str, str]:
    """Returns the options of other groups that an option chooses, and those that these choose."""
    file = option_file(group, name)
    own = _chosen(file) if file.is_file() else {}
    below = [all_chosen(key, value) for key, value in own.items()]
    return {key: value for chosen in (*below, own) for key, value in chosen.items()}


def _named(text: str) -> Iterator[tuple[str, str]]:
    if match := NAMED.fullmatch(text):
        yield from ((match[1], value) for value in match[2].split(","))


def _texts(tree: Any) -> Iterator[str]:
    """Yields the texts of a study's file, a grid's entries as overrides."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            if key in GROUPS and isinstance(value, list):
                yield from (f"{key}={entry}" for entry in value)
            yield from _texts(value)
    elif isinstance(tree, list):
        for entry in tree:
            yield from _texts(entry)


@lru_cache(maxsize=256)
def _head(file: Path) -> _Head:
    """Reads the comment that a file begins with: sentence, source, notes, and commands further right."""
    words, examples = [], []
    for line in read_text(file).splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#   fedsim "):
            examples.append(line[1:].strip())
        elif not line.startswith("# @package"):
            words.append(line[1:].strip())
    first, *rest = SENTENCE.split(" ".join(words)) if any(words) else [""]
    source = next((part for part in rest if part.startswith("Source: ")), "")
    notes = " ".join(part for part in rest if part != source)
    return _Head(first.strip(), source.removeprefix("Source: "), notes, tuple(examples))


def _chosen(file: Path) -> dict[str, str]:
    """Returns the options of other groups that a file chooses, those of a preset it builds on first."""
    tree = read_yaml(file)
    chosen: dict[str, str] = {}
    for entry in tree.get("defaults", ()) if isinstance(tree, dict) else ():
        if isinstance(entry, str) and entry != "_self_" and (base := file.with_name(f"{entry}.yaml")).is_file():
            chosen |= _chosen(base)
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if match := OVERRIDE.fullmatch(str(key)):
                chosen[match[1]] = str(value)
    return chosen


def _settings(group: str, name: str) -> list[Setting]:
    """Returns an option's settings, those of the options that it builds on first."""
    merged: dict[str, tuple[str, str]] = {}
    for file in _layers(group, name):
        merged |= {f"{group}.{key}": (value, "") for key, value in _beside(file)}
        for key, option in _below(file):
            merged |= _leaves(option, f"{group}.{key}")
        for key, (default, meaning) in _leaves(file, "" if group in PRESETS else group).items():
            merged[key] = (default, meaning or merged.get(key, ("", ""))[1])
    return [Setting(key, *rest) for key, rest in merged.items()]


def _beside(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the settings that a file fills with an option of a group, e.g. the strategy within another one."""
    tree = read_yaml(file)
    for entry in tree.get("defaults", ()) if isinstance(tree, dict) else ():
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if match := BESIDE.fullmatch(str(key)):
                yield match[2], str(value)


def _below(file: Path) -> Iterator[tuple[str, Path]]:
    """Yields the groups below its own from which a file takes an option, each with that option's file."""
    tree = read_yaml(file)
    for entry in tree.get("defaults", ()) if isinstance(tree, dict) else ():
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if (option := file.parent / str(key) / f"{value}.yaml").is_file():
                yield str(key), option


def _layers(group: str, name: str) -> list[Path]:
    """Returns the files that make an option, in Hydra's order."""
    file = option_file(group, name)
    tree = read_yaml(file)
    layers: list[Path] = []
    for entry in tree.get("defaults", ()) if isinstance(tree, dict) else ():
        if isinstance(entry, str) and entry != "_self_":
            layers += _layers(group, entry)
    return [*layers, file]


@lru_cache(maxsize=256)
def _leaves(file: Path, prefix: str) -> dict[str, tuple[str, str]]:
    """Returns the settings in a file by their whole keys, each with its default and the comment beside it."""
    text = read_text(file)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise FileError(f"{file} cannot be read: {one_line(error)}") from error
    found: dict[str, tuple[str, str]] = {}
    if isinstance(root, yaml.MappingNode):
        _walk(root, prefix, text, found)
    return found


def _walk(node: yaml.MappingNode, prefix: str, text: str, found: dict[str, tuple[str, str]]) -> None:
    """Adds the settings of a map; those of an object below it, which has a `_target_`, go by their own keys."""
    for key, value in node.value:
        where = f"{prefix}.{key.value}" if prefix else key.value
        if key.value == "defaults" or (key.value.startswith("_") and "." not in prefix) or key.value in HYDRAS:
            continue
        inner = {k.value for k, _ in value.value} if isinstance(value, yaml.MappingNode) else set()
        if inner and (not prefix or "_target_" in inner or inner <= HYDRAS):
            _walk(value, where, text, found)
            continue
        in_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        end = (key if in_block else value).end_mark.index
        meaning = text[end:].partition("\n")[0].partition("# ")[2].strip()
        found[where] = (_typed(value, text, in_block, not prefix), meaning)


def _typed(value: yaml.Node, text: str, in_block: bool, at_top: bool) -> str:
    """Returns a default as one types it; of one that follows another setting, which that is.

    At the top of the tree, one that follows a setting which few runs have is told as it is without that.
    """
    if in_block:
        return as_hydra(yaml.safe_load(yaml.serialize(value)))
    written = " ".join(text[value.start_mark.index : value.end_mark.index].split())
    follows = FOLLOWS.fullmatch(written)
    if follows and at_top and follows[2]:
        return follows[2]
    return f"as {follows[1]}" if follows else written


def _from_docstring(key: str, known: Mapping[str, str]) -> str:
    """Returns what the docstring of a class says about one of its settings."""
    return re.sub(r"\bNone\b", "null", known.get(key.removesuffix("._target_"), "").removesuffix("."))
