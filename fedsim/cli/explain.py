"""`fedsim explain`: all about one method, model, workload or other option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.listing import KINDS, AsJson, as_kind, complete_kind, line_of, names_of
from fedsim.report import strict_json

if TYPE_CHECKING:
    from fedsim.report.terminal import PlainConsole
    from fedsim.settings.described import Option

INDENT = 2
MAX_DEFAULT, MAX_SETTING = 40, 36  # letters of a default, and columns of a setting with its default
TELLING = ("strategy", "trainer", "model", "partition", "stream", "latency")  # whose classes say what they do


def _complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    kind = as_kind(str(ctx.params.get("kind")))
    return [name for name in names_of(kind) if name.startswith(incomplete)] if kind else []


def explain(
    kind: Annotated[
        str, typer.Argument(help="method, model, workload, and so on; or a name itself.", autocompletion=complete_kind)
    ],
    name: Annotated[str | None, typer.Argument(help="As fedsim list names it.", autocompletion=_complete_name)] = None,
    as_json: AsJson = False,
) -> None:
    """Say all about a method, model, workload or other option: paper, settings, what it sends, an example, studies.

    Example: fedsim explain method ditto
    """
    from fedsim.report.terminal import console

    found = explained(kind, name)
    if as_json:
        print(strict_json.dumps(found))
    else:
        show(found, console())


def explained(kind: str, name: str | None) -> dict[str, Any]:
    """Returns all that is known of what a user names.

    Raises:
        ConfigError: if there is no such thing; says where there is one of that name.
    """
    return facts(*_found(kind, name))


def _found(kind: str, name: str | None) -> tuple[str, str]:
    """Returns the kind and the name of what is meant."""
    from devices.errors import unknown
    from devices.texts import as_yaml
    from fedsim.errors import ConfigError

    one = as_kind(kind)
    wanted = kind if name is None else name
    homes = [other for other in KINDS.values() if wanted in names_of(other)]
    if name is None and not one:
        if not homes:
            everything = {*KINDS.values(), *(name for other in KINDS.values() for name in names_of(other))}
            raise ConfigError(unknown("name", kind, everything))
        return homes[0], kind
    if not one:
        raise ConfigError(unknown("kind", kind, KINDS.values()))
    if name is None:
        raise ConfigError(f"name the {one} to explain, e.g. fedsim explain {one} {names_of(one)[0]}")
    if one not in homes and homes:
        raise ConfigError(f"unknown {one} {as_yaml(name)}; did you mean: fedsim explain {homes[0]} {name}")
    if one not in homes:
        raise ConfigError(unknown(one, name, names_of(one)))
    return one, name


def facts(kind: str, name: str) -> dict[str, Any]:
    """Returns all that is known of something, by what it is."""
    from fedsim.settings.described import HALVES, all_chosen, describe, settings_of_top, studies_with

    head = {"kind": kind, "name": name, "is": line_of(kind, name)}
    if kind == "device":
        examples = [f"fedsim devices show {name}", f"fedsim devices fit --model resnet8 --device {name}"]
        return {**head, "settings": [], "examples": examples}
    if kind == "study":
        return {**head, **_study(name)}
    option = describe(kind, name)
    parts = [describe(*chosen) for chosen in all_chosen(kind, name).items()]
    halves = [part for half in HALVES for part in parts if part.group == half and kind == "method"]
    known = {s.key: s.meaning for s in [*settings_of_top(), *(s for part in parts for s in part.settings)]}
    beside = [part for part in parts if part.group in ("architecture", "participants", "loop") and kind == "method"]
    told = (*halves, *beside, option)  # a preset's own come last
    settings = {s.key: s for part in told for s in part.settings}.values()
    return {
        **head,
        "source": option.source,
        "notes": option.notes,
        "text": option.text if kind in TELLING else "",
        "class": option.target,
        "chooses": option.chooses,
        "halves": [{"half": h.group, "name": h.name, **_half(h)} for h in halves],
        **_sending(kind, option, halves),
        "settings": [
            {"key": s.key, "default": s.default, "meaning": s.meaning or known.get(s.key, "")} for s in settings
        ],
        "examples": list(option.examples),
        "studies": studies_with(kind, name),
        "file": str(option.file),
    }


def _half(half: Option) -> dict[str, str]:
    return {"is": half.sentence, "class": half.target, "text": half.text or half.sentence, "source": half.source}


def _study(name: str) -> dict[str, Any]:
    from devices.reading import read_yaml
    from fedsim.settings.groups import option_file

    tree = read_yaml(option_file("study", name))
    return {
        "notes": " ".join(str(tree.get("question", "")).split()),
        "arms": list(tree["arms"]),
        "seeds": list(tree["seeds"]),
        "settings": [],
        "examples": [f"fedsim study {name}"],
        "file": str(option_file("study", name)),
    }


def _sending(kind: str, option: Option, halves: list[Option]) -> dict[str, str]:
    """Returns what methods and their halves send, and what else says so of itself."""
    from fedsim.settings.described import HALVES

    if kind in ("method", *HALVES):
        return {"sends": _sends([option, *halves])}
    return {"sends": option.records} if option.records else {}


def _sends(parts: list[Option]) -> str:
    """Returns what the halves of a method send each other."""
    private = next((s.default for part in parts for s in part.settings if s.key == "private"), "")
    weights = f"the weights, both ways{f', but those of private={private}' if private else ''}"
    records = next((part.records for part in parts if part.records), "")
    if not records and (silent := [part.target for part in parts if part.records is None]):
        return f"{weights}; what else is not said: no line `Records:` in the docstring of {' or '.join(silent)}"
    if not records:
        return f"{weights}; nothing else"
    return records if records.startswith("arrays") else f"{weights}; beside them:\n{records}"


def show(found: dict[str, Any], shown: PlainConsole) -> None:
    """Prints what is known of something."""
    halves = found.get("halves", [])
    shown.note(f"{found['kind']} {found['name']}{': ' if found['is'] else ''}{found['is']}", style="bold")
    for text in _about(found):
        shown.indented(text, INDENT)
    for half, side in zip(halves, ("server", "client"), strict=False):
        _section(shown, f"on the {side}: {half['half']}={half['name']}", _about(half))
    if not halves and found.get("chooses"):
        _section(shown, "takes", [" ".join(f"{group}={name}" for group, name in found["chooses"].items())])
    if "sends" in found:
        _section(shown, "sends", [found["sends"]])
    if "arms" in found:
        _section(shown, "arms", [*found["arms"], f"seeds: {', '.join(map(str, found['seeds']))}"])
    if found["settings"]:
        _section(shown, "settings and their defaults", [])
        shown.pairs(((_typed(setting), setting["meaning"]) for setting in found["settings"]), INDENT, MAX_SETTING)
    studies = [f"fedsim study {name}" for name in found.get("studies", [])]
    _section(shown, "try", list(dict.fromkeys([*found["examples"], *studies])))


def _section(shown: PlainConsole, heading: str, texts: list[str]) -> None:
    shown.say("")
    shown.note(heading, style="bold")
    for text in texts:
        shown.indented(text, INDENT)


def _about(found: dict[str, Any]) -> list[str]:
    """Returns what is said of an option or a half of a method."""
    source = f"Paper: {found['source']}" if found.get("source") else ""
    made_by = f"Class: {found['class']}" if found.get("class") else ""
    return [text for text in (source, found.get("notes", ""), found.get("text", ""), made_by) if text]


def _typed(setting: dict[str, str]) -> str:
    from devices.texts import visible

    default = visible(setting["default"], MAX_DEFAULT)
    follows = default.startswith("as ")
    return f"{setting['key']} ({default})" if follows else f"{setting['key']}={default}"
