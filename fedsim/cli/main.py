"""The `fedsim` command. The outermost package: it alone imports `clients.app`, and nothing imports it.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fedsim.cli.averages import averages
from fedsim.cli.bench import bench
from fedsim.cli.compare import compare
from fedsim.cli.completing import OverridesCommand
from fedsim.cli.data import describe, list_data
from fedsim.cli.data_import import app as import_app
from fedsim.cli.devices.main import app as devices_app
from fedsim.cli.doctor import doctor
from fedsim.cli.explain import explain
from fedsim.cli.flower import flwr
from fedsim.cli.listing import list_options
from fedsim.cli.new import new
from fedsim.cli.process import run_app
from fedsim.cli.replay import replay
from fedsim.cli.report import report
from fedsim.cli.reprice import reprice
from fedsim.cli.resume import resume
from fedsim.cli.run import RUN_EPILOG, RunCommand, run
from fedsim.cli.study import study

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Start with: [bold]fedsim run[/bold], and find what there is with [bold]fedsim list[/bold]",
)
data_app = typer.Typer(no_args_is_help=True, help="What there is to learn from, and how it is split over clients.")
data_app.add_typer(import_app, name="import")
app.add_typer(data_app, name="data")
app.add_typer(devices_app, name="devices")
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command(cls=RunCommand, context_settings=PASS_THROUGH, epilog=RUN_EPILOG)(run)
app.command("list")(list_options)
app.command()(explain)
app.command(cls=OverridesCommand, context_settings=PASS_THROUGH)(flwr)
app.command()(compare)
app.command("paired", hidden=True)(compare)
app.command(cls=OverridesCommand, context_settings=PASS_THROUGH)(study)
app.command()(new)
app.command()(bench)
app.command()(replay)
app.command(cls=OverridesCommand, context_settings=PASS_THROUGH)(resume)
app.command(cls=OverridesCommand, context_settings=PASS_THROUGH)(reprice)
app.command()(report)
app.command()(doctor)
data_app.command("averages", cls=OverridesCommand, context_settings=PASS_THROUGH)(averages)
data_app.command("list")(list_data)
data_app.command("describe", cls=OverridesCommand, context_settings=PASS_THROUGH)(describe)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"fedsim {version('fedsim-edge')}")
        raise typer.Exit


@app.callback()
def _fedsim(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Federated and on-device learning judged as an edge workload: accuracy against simulated time, energy, memory
    and bytes.
    """


def main() -> None:
    """Runs the command line; the entry point of the console script."""
    run_app(partial(app, prog_name="fedsim"))


if __name__ == "__main__":
    main()
