"""`fedsim devices evaluate-search`: predictors judged by the searches that HELP was published with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.devices.answers import AsJson
from fedsim.cli.devices.search import NONE, Margin, Weights, check_margin
from fedsim.cli.options import parse_whole
from fedsim.report import strict_json

if TYPE_CHECKING:
    from devices.nas.help_searches import Reached, Search
    from fedsim.report.terminal import PlainTable

LEGEND = (
    "nets: measured to predict the others. met: within the limit when measured, and as accurate as published. over: "
    "selections that break the limit if nobody measures them; largest: by how much. checks: selections measured until "
    "one is within. Each predictor with its own error as margin, then without one"
)


Data = Annotated[Path, typer.Option(help="HELP's latency table of nb201, with MetaD2A's candidates (npz).")]
Predictors = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas: structured, help, flops, layerwise, profile; structured, layerwise, flops and, with "
        "--weights, help when left out."
    ),
]
Trained = Annotated[
    int,
    typer.Option(
        help="So many of the first networks that hold are trained and the most accurate is kept: 3 in HELP's code; 1 "
        "looks at no accuracy.",
        min=1,
        max=100,
    ),
]


def evaluate_search(
    data: Data,
    predictors: Predictors = None,
    measurements: Annotated[str, typer.Option(help="Separated by commas.")] = "10,20",
    seeds: Annotated[int, typer.Option(help="Repetitions; figures are means.", min=1, max=1000)] = 3,
    margin: Margin = None,
    trained: Trained = 1,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Judge predictors by what they are for: the 15 searches under a limit of HELP's table 4, on devices not seen.

    Candidates are those that MetaD2A generated, in the order of their predicted accuracies. A cell is met within the
    limit and with the published accuracy at least.

    Example: fedsim devices evaluate-search --data help_nb201.npz --weights help_checkpoint_nb201.npz
    """
    from devices.latency.few_shot import trials_of
    from devices.latency.spaces import load_space
    from devices.nas.help_searches import TABLE_4, bounds, load_candidates, search_all, summary
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console, work_bar

    check_margin(margin)
    names = (
        predictors.split(",") if predictors else ["structured", "layerwise", "flops", *(["help"] if weights else [])]
    )
    budgets = [parse_whole("--measurements", text) for text in measurements.split(",")]
    space = load_space("nb201", data)
    candidates, shown = load_candidates(data, space), console()
    trials = trials_of(names, budgets, ("chosen",), seeds=seeds, weights=weights)
    if not trials:
        raise ConfigError(
            f"--measurements {measurements} is too few for {', '.join(names)}; help needs 10, layerwise 5"
        )
    with work_bar(shown) as progress:
        task = progress.add_task("searching", total=len(trials) * seeds * len({cell.device for cell in TABLE_4}))
        margins = (None, 0.0) if margin is None else (margin,)
        found = search_all(space, candidates, trials, margins, trained, lambda: progress.advance(task))
    limits, figures = bounds(space, candidates, trained), summary(found)
    if as_json:
        rows = [_limit_facts(row) for row in limits]
        searches = [_search_facts(one) for one in found]
        print(strict_json.dumps({"cells": rows, "searches": searches, "summary": figures}))
        return
    first = trials[-1] if len(names) == 1 else next(t for t in reversed(trials) if t.predictor == names[0])
    group = (first.predictor, first.measurements, 0, margin is None)
    own = [s for s in found if (s.predictor, s.measurements, s.seed, s.own_margin) == group]
    shown.print(_cells_table(own, limits))
    shown.print(_summary_table(figures, limits, seeds))
    shown.note(LEGEND)
    impossible = [row["cell"] for row in limits if not row["best"].meets(row["cell"])]
    listed = ", ".join(f"{cell.device} {cell.limit_ms:g} ms" for cell in impossible)
    shown.note(f"no candidate meets {len(impossible)} of the published cells within the limit: {listed}")


def _limit_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    cell, rule, best = row["cell"], row["rule"], row["best"]
    met = {"met_by_rule": rule.meets(cell), "met_by_best": best.meets(cell)}
    return {"cell": cell._asdict(), "rule": vars(rule), "best": vars(best), **met}


def _search_facts(one: Search) -> dict[str, Any]:
    facts = {**vars(one), "cell": one.cell._asdict(), "met": one.reached.meets(one.cell), "excess": one.excess}
    return {**facts, "reached": vars(one.reached), "unverified": vars(one.unverified)}


def _cells_table(searches: list[Search], limits: list[dict[str, Any]]) -> PlainTable:
    """Returns what one predictor reached in each cell, between what is possible and what was published."""
    from fedsim.report.terminal import table

    one = searches[0]
    title = f"{one.predictor}, {one.measurements} networks measured, first seed: ms and accuracy"
    columns = ("limit", "reached", "met", "same rule,\ntrue ms", "best,\ntrue ms", "published")
    rows = table("device", *columns, left=("device",), title=title)
    for search, row in zip(searches, limits, strict=True):
        cell = search.cell
        cells = (_shown(search.reached), "yes" if search.reached.meets(cell) else "no", _shown(row["rule"]))
        rows.add_row(
            cell.device, f"{cell.limit_ms:g}", *cells, _shown(row["best"]), f"{cell.ms:.1f} {cell.accuracy:.1f}"
        )
    return rows


def _summary_table(figures: Iterable[Mapping[str, Any]], limits: list[dict[str, Any]], seeds: int) -> PlainTable:
    from fedsim.report.terminal import table

    title = f"15 cells, means over {seeds} seed(s)"
    columns = ("nets", "margin", "met", "over", "beyond\nmargin", "largest", "checks")
    rows = table("predictor", *columns, left=("predictor",), title=title)
    for f in figures:
        counts = (f"{f['cells_met']:.1f}", f"{f['violations']:.1f}", f"{f['beyond_margin']:.1f}")
        ends = (f"{100 * f['largest_excess']:.1f} %", f"{f['checks']:.1f}")
        rows.add_row(f["predictor"], str(f["measurements"]), f"{100 * f['margin']:.1f} %", *counts, *ends)
    rows.add_section()
    for name, key in (("true latencies", "rule"), ("best possible", "best")):
        rows.add_row(name, "all", NONE, f"{sum(row[key].meets(row['cell']) for row in limits)}", "0", "0", "0 %", NONE)
    over = [row["cell"] for row in limits if row["cell"].ms > row["cell"].limit_ms]
    largest = max(cell.ms / cell.limit_ms - 1 for cell in over)
    met = str(len(limits) - len(over))
    rows.add_row("published HELP", "10", NONE, met, str(len(over)), NONE, f"{100 * largest:.1f} %", NONE)
    return rows


def _shown(reached: Reached) -> str:
    return NONE if reached.ms is None else f"{reached.ms:.1f} {reached.accuracy:.1f}"
