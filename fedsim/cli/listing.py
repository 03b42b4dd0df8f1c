"""`fedsim list`: what there is to choose from, with a line for each."""

from __future__ import annotations

from typing import Annotated

import typer

from fedsim.report import strict_json

# As they are listed, and as the settings call one of them.
KINDS = {
    **{"methods": "method", "workloads": "workload", "models": "model", "fleets": "fleet", "devices": "device"},
    **{"studies": "study", "experiments": "experiment", "partitions": "partition", "streams": "stream"},
    **{"strategies": "strategy", "trainers": "trainer", "uplinks": "uplink", "compressions": "compression"},
    **{"latencies": "latency", "engines": "engine", "loops": "loop", "participants": "participants"},
    **{"attacks": "attack", "architectures": "architecture"},
}
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def as_kind(text: str) -> str:
    """Returns the kind that a word names, in the singular; empty for a word that names none."""
    return KINDS.get(text, text if text in KINDS.values() else "")


def names_of(kind: str) -> list[str]:
    """Returns the names of what there is of a kind."""
    from devices.profile import profile_names
    from fedsim.settings.groups import options

    return list(profile_names()) if kind == "device" else options(kind)


def line_of(kind: str, name: str) -> str:
    """Returns in one sentence what something is."""
    from devices.profile import load_profile
    from devices.reading import read_yaml
    from devices.units import short_size
    from fedsim.settings.described import sentence_of
    from fedsim.settings.groups import option_file

    if kind == "device":
        profile = load_profile(name)
        parts = (profile.kind, profile.soc, f"{short_size(profile.memory_bytes)} to train in")
        return ", ".join(part for part in parts if part)
    return str(read_yaml(option_file(kind, name))["title"]) if kind == "study" else sentence_of(kind, name)


def complete_kind(incomplete: str) -> list[str]:
    """Returns the kinds that begin so, for a shell."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def list_options(
    kind: Annotated[
        str | None,
        typer.Argument(help="methods, models, workloads, devices, studies, and so on.", autocompletion=complete_kind),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what there is to choose from, with a line for each: methods, models, workloads, devices, studies and more.

    Example: fedsim list methods
    """
    from devices.errors import unknown
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console

    shown, found = console(), as_kind(kind or "")
    if kind is None:
        names = {plural: names_of(one) for plural, one in KINDS.items()}
        if as_json:
            print(strict_json.dumps(names))
            return
        shown.pairs((plural, _all_or_some(found)) for plural, found in names.items())
        shown.note("a line for each: fedsim list methods; all about one: fedsim explain method ditto")
        return
    if not found:
        raise ConfigError(unknown("kind", kind, KINDS))
    lines = {name: line_of(found, name) for name in names_of(found)}
    if as_json:
        print(strict_json.dumps([{"name": name, "is": line} for name, line in lines.items()]))
    else:
        shown.pairs(lines.items())


def _all_or_some(names: list[str], most: int = 40) -> str:
    more = f" and {len(names) - most // 4} more" if len(names) > most else ""
    return ", ".join(names[: most // 4] if more else names) + more
