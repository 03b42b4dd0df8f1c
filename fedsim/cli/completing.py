"""What a shell completes: groups, options and settings of commands that take overrides, and names of devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from click.shell_completion import CompletionItem

HELP_LETTERS = 60  # on one line of a terminal, beside a name


class OverridesCommand(typer.core.TyperCommand):
    """Completes KEY=VALUE; some shells break it at the equals sign, and complete what stands behind it."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Returns what may stand here."""
        from devices.texts import visible
        from fedsim.settings.groups import GROUPS

        given = " ".join(ctx.args).replace(" =", "=").replace("= ", "=").split()
        is_split = ctx.args[-1:] == ["="] or (not incomplete and ctx.args[-1:] and ctx.args[-1] in GROUPS)
        key, sign, value = incomplete.partition("=")
        if is_split:
            found = list(_options(given[-1].removesuffix("="), incomplete))
        elif sign:
            found = [(f"{key}={name}", text) for name, text in _options(key, value)]
        elif self.name == "study" and not given:
            found = [(name, text) for name, text in _options("study", incomplete)]
        else:
            found = list(_keys(incomplete, given))
        return [
            CompletionItem(text, help=visible(help, HELP_LETTERS)) for text, help in found
        ] or super().shell_complete(ctx, incomplete)


def complete_device(incomplete: str) -> list[tuple[str, str]]:
    """Returns the shipped devices that begin so, with what they are."""
    return list(_options("device", incomplete))


def _options(group: str, beginning: str) -> Iterator[tuple[str, str]]:
    from fedsim.cli.listing import KINDS, line_of, names_of

    for name in names_of(group) if group in KINDS.values() else ():
        if name.startswith(beginning):
            yield name, line_of(group, name)


def _keys(beginning: str, given: list[str]) -> Iterator[tuple[str, str]]:
    """Yields settings that begin so; of a single group its options, of a single setting its default."""
    from fedsim.settings.described import all_chosen, defaults, describe, groups_in_words, settings_of_top
    from fedsim.settings.groups import GROUPS, options

    group, dot, _ = beginning.partition(".")
    if dot and group in GROUPS:
        typed = dict(word.split("=", 1) for word in given if "=" in word)
        presets = [all_chosen(key, name) for key, name in typed.items() if key in GROUPS]
        chosen = {key: name for choice in (defaults(), *presets, typed) for key, name in choice.items()}
        settings = describe(group, chosen[group]).settings if chosen.get(group) in options(group) else ()
    else:
        settings = tuple(settings_of_top())
    keys = {s.key: (s.default, s.meaning) for s in settings if s.key.startswith(beginning)}
    groups = {name: text for name, text in groups_in_words().items() if name.startswith(beginning)}
    if len(keys) + len(groups) > 1:
        yield from ((f"{key}=", text) for key, (_, text) in keys.items())
        yield from ((f"{key}=", text) for key, text in groups.items())
        return
    yield from ((f"{key}={default}", text) for key, (default, text) in keys.items())
    yield from ((f"{key}={name}", text) for key in groups for name, text in _options(key, ""))
