"""`fedsim flwr`: an experiment on Flower's own runtime, with the same result and an exit code that tells the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def flwr(
    ctx: typer.Context,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that train clients; the cores of this host when left out.", min=1, max=4096),
    ] = None,
    superlink_port: Annotated[int, typer.Option(help="Port on loopback; 0 takes a free one.", min=0, max=65535)] = 0,
    ray_address: Annotated[
        str, typer.Option(help="HOST:PORT of a standing Ray cluster, or auto; Ray is started when left out.")
    ] = "",
    app: Annotated[
        Path | None, typer.Option(help="Flower app folder to bundle and run; the installed fedsim when left out.")
    ] = None,
) -> None:
    """Run one experiment on Flower's own runtime. Takes the overrides of `fedsim run` and gives the same bytes.

    Ends with 0 only when Flower says that the run completed; the SuperLink and all it started end with the command.

    Example: fedsim flwr method=fedprox fleet=mixed rounds=20 --workers 4
    """
    settings = _composed(ctx.args)  # before anything heavy is imported
    if app is not None and not (app / "pyproject.toml").is_file():
        raise _wrong(f"--app={app} must be a folder with a pyproject.toml")
    if ray_address and workers is None:
        raise _wrong("--ray-address needs --workers=N: how many CPUs of the cluster are to train clients")

    from fedsim.engines.flower.runtime import Place
    from fedsim.engines.host import usable_cores
    from fedsim.report.place import new_run_folder
    from fedsim.report.progress import progress_bar
    from fedsim.report.rounds import read_rounds
    from fedsim.report.terminal import console
    from fedsim.report.text import closing_lines, closing_table
    from fedsim.runs.flower_launch import run
    from fedsim.settings.run_settings import RunSettings
    from fedsim.workloads.metrics import Metric

    typed = RunSettings.of(settings)
    place = Place(
        workers=workers or min(usable_cores(), typed.num_asked),
        gpus=_gpus(typed.engine.device),
        threads=typed.engine.threads,
        port=superlink_port,
        ray_address=ray_address,
    )
    shown = console()
    with new_run_folder(typed) as folder:
        _try_out(settings)
        with progress_bar(shown, typed.rounds, folder) as (watch, _):
            summary = run(settings, folder, place, app, watch)
    reports = read_rounds(folder)
    shown.print(closing_table(reports, Metric.named_in(summary)))
    for line in closing_lines(summary, folder, reports):
        shown.say(line)


def _composed(arguments: list[str]) -> dict[str, Any]:
    from fedsim.runs.engine_choice import settled
    from fedsim.settings.compose import compose
    from fedsim.settings.run_settings import RunSettings

    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise _wrong(f"fedsim flwr does not know {flags[0]}; it takes KEY=VALUE settings (sweeps: fedsim run -m)")
    settings = compose(arguments)
    engine = RunSettings.of(settings).choices["engine"]
    if engine not in ("auto", "local"):
        raise _wrong(f"fedsim flwr runs on Flower's own engine: leave out engine={engine} (--workers=N sets its size)")
    (settings,), _ = settled([settings])  # or the bytes would not be those of `fedsim run`
    return {**settings, "engine": {**settings["engine"], "slots": 0}}  # Flower hands out single clients


def _try_out(settings: dict[str, Any]) -> None:
    """Builds data and strategy once here, so that Flower is never started for settings that a run would refuse."""
    import json

    from fedsim.runs.pairs import try_out
    from fedsim.settings.build import build_world

    try_out(settings, build_world(json.dumps(settings)).workload.num_clients)
    build_world.cache_clear()  # the data are needed in Flower's processes only


def _gpus(device: str) -> int:
    """Returns how many GPUs the engine's setting `device` takes on this host."""
    import torch

    from fedsim.settings.build import pick_device

    return torch.cuda.device_count() if pick_device(device).type == "cuda" else 0


def _wrong(text: str) -> Exception:
    from fedsim.errors import ConfigError

    return ConfigError(text)
