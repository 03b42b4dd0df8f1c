"""`fedsim run`: one experiment, or a sweep of them."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import typer

from fedsim.cli.completing import OverridesCommand
from fedsim.cli.hydra_run import run_with_hydra

if TYPE_CHECKING:
    from fedsim.report.terminal import PlainConsole

RUN_EPILOG = """
[bold]Examples[/bold]

fedsim run

fedsim run method=fedprox fleet=mixed rounds=50 seed=3

fedsim run workload=mnist_writers cohort=20 deadline_s=30 out=runs/deadline

fedsim run -m strategy=fedavg,fedadam seed=1,2,3

fedsim run --config-path $PWD/runs/A --config-name config out=B     (repeats run A)
"""
FLAGS = {
    "-m": "a sweep: each combination of values separated by commas, e.g. -m method=fedavg,fedprox seed=1,2,3",
    "--cfg job": "print the whole tree of settings, and run nothing",
    "--config-dir DIR": "a folder with options of your own, e.g. DIR/model/mine.yaml; that of the working folder, "
    "configs, is looked into anyway",
    "--config-path DIR --config-name NAME": "another tree in the place of fedsim's, as the config.yaml of a run",
    "--allow-target NAME": "let a _target_ name code that is neither fedsim's, Flower's, torch's, a plug-in's nor in a "
    "module of the working folder; also of resume, replay, study and flwr",
}
TYPED = "fedsim.typed"


class RunCommand(OverridesCommand):
    """Explains settings when help is asked for: all of them, or those of the options on the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps what was typed, which help goes by."""
        ctx.meta[TYPED] = list(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help."""
        from fedsim.cli.explain import explained, show
        from fedsim.report.terminal import console
        from fedsim.settings.groups import GROUPS

        shown = console()
        pairs = (text.partition("=") for text in ctx.meta[TYPED])
        asked = [(group, name) for group, _, names in pairs if group in GROUPS for name in names.split(",")]
        if not asked:
            super().format_help(ctx, formatter)
            _print_settings(shown)
        for group, name in asked:
            show(explained(group, name), shown)
            shown.say("")
        if asked:
            shown.say("all settings and groups: fedsim run --help")


def _print_settings(shown: PlainConsole) -> None:
    """Prints the flags, the settings of the top and the groups with their options."""
    from fedsim.settings.described import groups_in_words, settings_of_top
    from fedsim.settings.groups import options

    top = [(f"{s.key}={s.default}", s.meaning) for s in settings_of_top()]
    groups = [(f"{group}=", f"{text}: {' '.join(options(group))}") for group, text in groups_in_words().items()]
    for heading, rows in (("Flags", list(FLAGS.items())), ("Settings", top), ("Groups", groups)):
        shown.note(heading, style="bold")
        shown.pairs(rows, indent=1)
        shown.say("")
    shown.note(
        "A line for each option: fedsim list methods. All about one, with its settings: fedsim explain method ditto"
    )


def run(ctx: typer.Context) -> None:
    """Run one experiment, or a sweep with -m. Overrides have Hydra's syntax: KEY=VALUE."""
    gc.disable()  # until the run begins: imports leave no garbage, and looking for it is an eighth of their time
    run_with_hydra(ctx.args)
