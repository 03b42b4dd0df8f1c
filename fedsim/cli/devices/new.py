"""`fedsim devices new`: a profile of one's own, to start from a device that is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.options import check_name, check_place

if TYPE_CHECKING:
    from devices.profile_file import Figure

HEAD = """\
# {name}: begun as a copy of {like}. Change what is known of the device, and say where each figure is from.
# A figure is {{value, provenance, source}}, or a plain number; provenance is one of
# {provenances}.
# Lines that begin with '# ' and a key may be used too: they show what counts without them, or '...' where nothing does.
"""
LATENCY = """\
latency:
  # Prices of another device, scaled: multiply-adds by the peak, bytes by the memory's bandwidth, calls by the clock;
  # all by `factor`, where it is given: how many times slower this device is. To measure: `fedsim devices calibrate`.
  scaled: """
LINK = "a link of devices/links.yaml for all that is left out here, and for the radio's power below"


def new(
    name: Annotated[str, typer.Argument(help="Name of the new device, e.g. my_board.")],
    like: Annotated[str, typer.Option(help="The device to copy: a shipped one, or the path of a profile.")],
    out: Annotated[Path | None, typer.Option(help="Profile to write; NAME.yaml when left out.")] = None,
) -> None:
    """Write a profile of your own as a copy of a device, with a comment for every key.

    Example: fedsim devices new my_board --like raspberry_pi_4
    """
    from devices.errors import DeviceError
    from devices.writing import write_atomic

    check_name("NAME", name)
    path = out or Path(f"{name}.yaml")
    check_place("--out", path, (".yaml", ".yml"))
    text = commented_profile(name, like)
    if os.path.lexists(path):
        raise DeviceError(f"{path} is there already; name another profile with --out or remove it")
    write_atomic(path, text)
    print(f"profile: {path}, a copy of {like}; change its figures")
    print(f"look at it: fedsim devices show {path}")
    print(f"use it: fedsim run 'fleet.devices={{{path.resolve()}: 1}}'")


def commented_profile(name: str, like: str) -> str:
    """Returns the text of a profile that equals device `like` but for its name, with a comment for every key.

    Raises:
        DeviceError: if there is no such device, or it is a way to run another one.
    """
    from devices.errors import DeviceError
    from devices.profile import ISAS, KINDS, SHIPPED, load_profile, profile_names
    from devices.profile_file import FIGURES, PROVENANCES, read_yaml

    load_profile(like)  # says what is wrong with it
    base, _, variant = like.rpartition("@")
    if base and not Path(like).exists():
        raise DeviceError(f"--like must be a device, got {variant!r} of {base}, a way to run it; take {base}")
    path = SHIPPED / f"{like}.yaml" if like in profile_names() else Path(like)
    tree = read_yaml(path)
    lines = [
        HEAD.format(name=name, like=like, provenances=", ".join(PROVENANCES)) + f"name: {json.dumps(name)}",
        f"kind: {tree['kind']}  # one of {', '.join(KINDS)}",
        _entry("soc", tree, "the chip", "..."),
        _entry("core", tree, "microarchitecture of the cores that compute", "..."),
        _entry("isa", tree, f"instruction set, one of {', '.join(ISAS)}", "none"),
    ]
    for section, figures in FIGURES.items():
        found = tree.get(section)
        if found is None:
            lines.append(f"# {section}:")
            lines += [f"#   {line}" for line in _figures({}, figures)]
            continue
        lines.append(f"{section}:")
        if section == "network":
            lines.append(f"  {_entry('link', found, LINK, '...')}")
        lines += [f"  {line}" for line in _figures(found, figures)]
    if "latency" in tree:
        own = tree["latency"].get("scaled") if like not in profile_names() else None
        lines.append(LATENCY + _flow(own or {"device": like if like in profile_names() else str(path.resolve())}))
    return "\n".join(lines) + "\n"


def _figures(found: Mapping[str, Any], figures: Mapping[str, Figure]) -> list[str]:
    """Returns the lines of a section: each figure under its unit and meaning, those that are left out behind a '# '."""
    lines = []
    for key, figure in figures.items():
        default = "..." if figure.default is None else f"{figure.default:g}"
        lines += [f"# {figure.meaning}", f"{key}: {_flow(found[key])}" if key in found else f"# {key}: {default}"]
    return lines


def _entry(key: str, found: Mapping[str, Any], meaning: str, default: str) -> str:
    return f"{key}: {_flow(found[key])}  # {meaning}" if key in found else f"# {key}: {default}  # {meaning}"


def _flow(value: Any) -> str:
    """Returns a value as YAML on one line."""
    import yaml

    return str(yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10**6)).strip()[1:-1]
