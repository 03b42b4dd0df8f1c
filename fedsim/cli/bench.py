"""`fedsim bench`: what the engines cost above a bare loop."""

from __future__ import annotations

from typing import Annotated

import typer

from fedsim.cli.options import MAX_COUNT, parse_whole
from fedsim.report import strict_json
from fedsim.runs.experiment import build_engine


def bench(
    model: Annotated[str, typer.Option(help="Model config to train.")] = "lenet5",
    rounds: Annotated[int, typer.Option(help="Rounds per side; the sides take turns.", min=2, max=MAX_COUNT)] = 30,
    engines: Annotated[str, typer.Option(help="Engines to measure; left out: local,ray, on a card slots.")] = "",
    device: Annotated[str, typer.Option(help="Where all sides train: cpu or cuda.")] = "cpu",
    skew: Annotated[float, typer.Option(help="Clients' sizes ~ Dirichlet(skew); 0: all equal.", min=0, max=1000)] = 0,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let a GPU multiply in 19 bits.")] = False,
    method: Annotated[str, typer.Option(help="Method of the engines' runs.")] = "",
    workers: Annotated[int, typer.Option(help="Workers of ray; 0: one per core.", min=0, max=4096)] = 0,
    population: Annotated[str, typer.Option(help="Also time rounds with these numbers of clients.")] = "",
    cohort: Annotated[str, typer.Option(help="Also time rounds with these cohorts.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the engines' overhead: client updates per second beside bare PyTorch loops doing the same steps.

    Example: fedsim bench --engines local --population 1000,1000000 --cohort 100
    """
    from devices.errors import unknown
    from fedsim.cli.bench_rounds import Bench, measure, tables
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console
    from fedsim.runs.engine_choice import has_card
    from fedsim.settings.groups import options

    if device not in ("cpu", "cuda"):
        raise ConfigError(unknown("--device", device, ("cpu", "cuda")))
    if device == "cuda" and not has_card():
        raise ConfigError("--device=cuda needs a GPU, and torch finds none here; use --device=cpu")
    if tf32 and device == "cpu":
        raise ConfigError("--tf32 is for a GPU; use it with --device=cuda")
    names = [name for name in (engines or ("slots" if device == "cuda" else "local,ray")).split(",") if name]
    for name in names or [engines]:
        if name not in options("engine"):
            raise ConfigError(unknown("engine", name, options("engine")))
    populations, cohorts = (
        [parse_whole(flag, text) for text in given.split(",")] if given else []
        for flag, given in (("--population", population), ("--cohort", cohort))
    )
    given = Bench(model, device, skew or None, tf32, (f"method={method}",) if method else ())
    result = measure(build_engine, given, rounds, names, workers or None, populations, cohorts)
    if as_json:
        print(strict_json.dumps(result))
    else:
        for shown in tables(result):
            console().print(shown)
