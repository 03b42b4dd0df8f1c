"""The `fedsim` command. The outermost module: it alone imports `clients.app`, and nothing imports it.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Federated and on-device learning judged as an edge workload: accuracy against simulated time, energy, memory "
    "and bytes.",
    epilog="Start with: [bold]fedsim run[/bold]",
)
data_app = typer.Typer(no_args_is_help=True, help="What there is to learn from, and how it is split over clients.")
app.add_typer(data_app, name="data")

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
RUN_EPILOG = """
[bold]Examples[/bold]

fedsim run

fedsim run method=fedprox fleet=mixed rounds=50 seed=3

fedsim run workload=mnist_writers cohort=20 deadline_s=30 out=runs/deadline

fedsim run -m strategy=fedavg,fedadam seed=1,2,3

fedsim run --config-path $PWD/runs/A --config-name config out=B     (repeats run A)

[bold]Settings[/bold]: rounds= seed= cohort= num_clients= over_selection= deadline_s= target_accuracy= max_simulated_s=
evaluate_every= evaluate_clients= on_client_error= out= name=

[bold]Groups[/bold]: {groups}

Anything below a group can be set too, e.g. trainer.lr=0.05 partition.classes_per_client=3; the whole tree is printed by
fedsim run --cfg job
"""


def _groups() -> str:
    from fedsim.settings import GROUPS, options

    return "\n\n".join(f"{group}= {' '.join(options(group))}" for group in GROUPS if options(group))


class _RunCommand(typer.core.TyperCommand):
    """Fills the option names into the help only when it is asked for."""

    def get_help(self, ctx: Any) -> str:
        self.epilog = RUN_EPILOG.format(groups="\n\n" + _groups())
        return super().get_help(ctx)


@app.command(cls=_RunCommand, context_settings=PASS_THROUGH, epilog=RUN_EPILOG)
def run(ctx: typer.Context) -> None:
    """Run one experiment, or a sweep with -m. Overrides have Hydra's syntax: KEY=VALUE."""
    _hydra_run(ctx.args)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Model config to train.")] = "lenet5",
    rounds: Annotated[int, typer.Option(help="Rounds per engine, interleaved with the bare loop.", min=2)] = 30,
    population: Annotated[
        str, typer.Option(help="Also time a round at these numbers of clients, e.g. 100,10000.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the engine's overhead: client updates per second beside a bare PyTorch loop doing the same steps.

    Example: fedsim bench --population 100,10000
    """
    from fedsim.bench import bench as measure
    from fedsim.bench import table

    sizes = [_whole("--population", text) for text in population.split(",") if text]
    result = measure(_local_engine, model, rounds, sizes)
    if as_json:
        import json

        print(json.dumps(result))
    else:
        _console().print(table(result))


@app.command()
def doctor() -> None:
    """Check this installation: versions, GPU, data, writable folders, and a run of a few seconds.

    Example: fedsim doctor
    """
    from fedsim.doctor import examine

    raise typer.Exit(examine(_console(), _local_engine))


@data_app.command("list")
def data_list() -> None:
    """List the workloads, and whether their data are here.

    Example: FEDSIM_DATA=/data/bundles fedsim data list
    """
    from fedsim.console import workload_table
    from fedsim.data.describe import list_workloads

    _console().print(workload_table(list_workloads()))


@data_app.command("describe", context_settings=PASS_THROUGH)
def data_describe(
    ctx: typer.Context,
    picture: Annotated[Path, typer.Option(help="Where the picture of the split goes.")] = Path("split.png"),
    limit: Annotated[int, typer.Option(help="Clients in the table.", min=1)] = 20,
) -> None:
    """Show how the examples are split over clients, as a table and a picture; takes the overrides of `fedsim run`.

    Example: fedsim data describe workload=digits partition=dirichlet partition.alpha=0.1 --picture split.png
    """
    import json

    from fedsim.console import split_table
    from fedsim.data.describe import split_picture, summary_lines
    from fedsim.data.describe import split_table as split_rows
    from fedsim.settings import build_world, compose

    workload = build_world(json.dumps(compose(ctx.args))).workload
    console = _console()
    console.print(split_table(split_rows(workload, limit), workload.num_clients))
    for line in summary_lines(workload):
        console.print(line, highlight=False)
    split_picture(workload, picture)
    console.print(f"picture: {picture}")


def main() -> None:
    """Entry point of the console script: one sentence and an exit code for everything a user can mend."""
    from devices.errors import DeviceError
    from fedsim.errors import ConfigError, DataError, RunError

    try:
        app()
    except (ConfigError, DataError, DeviceError) as error:
        _give_up(str(error), 2, error)
    except RunError as error:
        _give_up(str(error), 1, error)
    except KeyboardInterrupt:
        _give_up("interrupted; everything written so far stays", 130, None)


def _give_up(text: str, code: int, error: BaseException | None) -> None:
    if error is not None and os.environ.get("FEDSIM_TRACEBACK") == "1":
        print(getattr(error, "traceback", ""), file=sys.stderr)
        raise error
    print(f"fedsim: {text}", file=sys.stderr)
    sys.exit(code)


# --- running -------------------------------------------------------------------------------------------------------


def _hydra_run(arguments: list[str]) -> None:
    """Hands over to Hydra, which composes the config and, with -m, expands the sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from fedsim.settings import one_sentence, resolve

    # Exceptions must reach main(): Hydra would print them and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    summaries: list[tuple[list[str], dict[str, Any]]] = []

    @hydra.main(version_base="1.3", config_path="pkg://configs", config_name="run")
    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        sweeping = hydra_config.mode == RunMode.MULTIRUN
        settings = resolve(config, hydra_config.runtime.choices)
        if sweeping:
            settings["out"] = str(Path(hydra_config.sweep.dir) / str(hydra_config.job.num))
        summaries.append((list(hydra_config.overrides.task), run_one(settings)))

    sys.argv = ["fedsim run", *arguments, *_hydra_settings(arguments)]
    with one_sentence():
        job()
    if len(summaries) > 1:
        from fedsim.console import sweep_table

        _console().print(sweep_table(summaries))


def _hydra_settings(arguments: list[str]) -> list[str]:
    """Hydra writes no folder and no log of its own; a sweep's runs go below `out` or a dated folder."""
    fixed = [
        "hydra.output_subdir=null",
        "hydra.run.dir=.",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
    ]
    out = [a.split("=", 1)[1] for a in arguments if a.startswith("out=")]
    folder = out[-1] if out else f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep"
    return [*fixed, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}"]


def run_one(settings: dict[str, Any]) -> dict[str, Any]:
    """One experiment with its progress bar and closing table."""
    from fedsim.console import closing_lines, closing_table, progress_bar
    from fedsim.federation import run as run_federation
    from fedsim.report import read_rounds, run_folder

    console, folder = _console(), run_folder(settings)
    with progress_bar(console, settings["rounds"]) as (watch, observe):
        summary = run_federation(settings, _local_engine(settings), folder, watch, observe)
    console.print(closing_table(read_rounds(folder)))
    for line in closing_lines(summary, folder):
        console.print(line, highlight=False, soft_wrap=True)
    return summary


def _local_engine(settings: dict[str, Any]) -> Any:
    from clients.app import app as client_app
    from fedsim.settings import instantiate

    quiet_flower()
    return instantiate(settings, "engine", client_app=client_app)


def quiet_flower() -> None:
    """Flower logs every round; the progress bar says it better. Warnings of ours come through `fedsim` itself."""
    import logging

    logger = logging.getLogger("flwr")
    logger.propagate = False
    logger.setLevel(logging.ERROR)


def _whole(option: str, text: str) -> int:
    from fedsim.errors import ConfigError

    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{option} takes whole numbers of at least 1, separated by commas, got {text!r}")
    return int(text)


def _console() -> Any:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()
