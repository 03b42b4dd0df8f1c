"""A comparison or a study as one page of HTML that needs nothing else, of the look of a run's page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from devices.units import energy, simulated, size
from devices.writing import write_atomic
from fedsim.report.html import Page, Part, Table
from fedsim.report.place import PAGE
from fedsim.report.plots.compared import (
    arm_legend,
    arm_styles,
    curves_of_arms,
    scores_against_costs,
    scores_against_figures,
)
from fedsim.report.rounds import running_costs
from fedsim.study.answer import answer
from fedsim.study.columns import beside_costs
from fedsim.study.compare import NAME
from fedsim.study.page import compare_command, label, scores_are_of, study_command, to_target
from fedsim.study.paired import correction, unmatched
from fedsim.study.results import FinishedRun, Result, left_at_work
from fedsim.study.tables import costs, figures, scores
from fedsim.workloads.metrics import judged

MOST_RUNS = 500  # lines of the table of runs
MOST_COLUMNS = 9  # beside the arms, that a page is wide enough for
FILES = {
    "md": "the same as Markdown",
    "csv": "the table",
    "json": "all figures",
    "png": "the curves as a picture",
}
NOT_BEATEN = "The grey line joins the arms that no other beats in score and cost at once."
BANDS = "Means over the seeds; bands, from three seeds on: their standard deviation."


def write_web_page(result: Result, failed: Mapping[str, str], out: Path, name: str) -> Path:
    """Writes `<name>.html` into the folder of a comparison or study.

    Args:
        result: what is shown.
        failed: the sentences of runs that failed, by their names.
        out: the folder.
        name: of the files beside it too.

    Raises:
        OSError: if the file cannot be written.
    """
    path = out / f"{name}.html"
    write_atomic(path, page_of(result, failed, out, name).as_html())
    return path


def page_of(result: Result, failed: Mapping[str, str], out: Path, name: str) -> Page:
    """Returns the page."""
    study, styles = result.study, arm_styles(result)
    few = f"Drawn are {len(styles)} of {len(result.rows)} arms: the best, and the one that others are compared with. "
    note = few if len(result.rows) > len(styles) else ""
    count = sum(map(len, result.runs.values()))
    parts = [_table(result), *_targets(result)]
    if drawn := curves_of_arms(result, styles):
        parts.append(Part(f"What {result.metric.title} took", drawn, (), note + BANDS, arm_legend(styles)))
    if drawn := scores_against_figures(result, styles):
        parts.append(Part("The score against figures of a run", drawn, (), note, arm_legend(styles)))
    if len(result.rows) > 1:
        drawn = scores_against_costs(result, styles)
        parts.append(Part("The score against its cost", drawn, (), NOT_BEATEN, arm_legend(styles)))
    return Page(
        title=study.title if study.name != NAME else f"{study.title} compared",
        mark=f"comparison of {count} run{'s' if count > 1 else ''}",
        where=str(out),
        answer=answer(result),
        warnings=[f"{run} failed: {reason}" for run, reason in failed.items()],
        lines=[*([study.question] if study.question else []), *study.differs, *_left_out(result), *_reading(result)],
        parts=[*parts, _runs(result, out)],
        commands=list(_commands(result)),
        files=[(f"{name}.{ending}", what) for ending, what in FILES.items()],
    )


def _left_out(result: Result) -> list[str]:
    return [result.study.left_out] if result.study.left_out else []


def _reading(result: Result) -> list[str]:
    return [result.study.reading] if result.study.reading and not result.study.own else []


def _table(result: Result) -> Part:
    study = result.study
    seeds = ", ".join(map(str, study.seeds))
    over = f"Mean ± standard deviation of seeds {seeds}" if len(study.seeds) > 1 else f"Seed {seeds}"
    columns, more = {**scores(result), **costs(result)}, figures(result)
    tables = [columns, more] if more and len(columns) + len(more) > MOST_COLUMNS else [{**columns, **more}]
    notes = [over, *([f"differences to {study.against}"] if len(result.rows) > 1 else [])]
    notes += [scores_are_of(result)]
    notes += [correction(result.rows)] if "difference" in columns else []
    notes += [*unmatched(result.rows, study.against), *beside_costs(result.columns), *left_at_work(result)]
    return Part(
        "Scores and costs", (), [_as_table(result, each) for each in tables], "; ".join(filter(None, notes)) + "."
    )


def _targets(result: Result) -> Iterator[Part]:
    columns = to_target(result)
    if columns and result.study.target is not None:
        title = f"What it took to reach {result.metric.with_unit(result.study.target)}"
        note = "Means stand where every seed got there: those of the others would flatter an arm."
        yield Part(title, (), [_as_table(result, columns)], note)


def _as_table(result: Result, columns: Mapping[str, Sequence[str]]) -> Table:
    labels = [label(row, result.study) for row in result.rows]
    header = ["arm", *(" ".join(name.split()) for name in columns)]
    return Table(header, [list(cells) for cells in zip(labels, *columns.values(), strict=True)])


def _runs(result: Result, out: Path) -> Part:
    """Lists the runs, each with the way to its own page."""
    runs = [run for arm in result.study.arms for run in result.runs.get(arm.label, ())]
    shown = runs[:MOST_RUNS]
    rows = [_line(result, run) for run in shown]
    pages = [run.run.folder / PAGE for run in shown]
    links = [os.path.relpath(page, out) if page.is_file() else "" for page in pages]
    header = ["run", "seed", f"{result.metric.label}, last evaluation", "time", "energy", "traffic", "rounds"]
    more = f"{len(runs) - MOST_RUNS} more runs are in {NAME}.json." if len(runs) > MOST_RUNS else ""
    return Part("Runs", (), [Table(header, rows, "", links)], more)


def _line(result: Result, run: FinishedRun) -> list[str]:
    metric, took = result.metric, {key: values[-1] for key, values in running_costs(run.rounds).items()}
    last = judged(run.rounds, metric)[-1:]
    value = last[0].metrics.get(metric.name) if last else None
    score = "not judged" if value is None else metric.number(value)
    spent = [simulated(took["simulated_s"]), energy(took["joules"]), size(took["traffic_bytes"])]
    return [run.run.arm.label, str(run.run.seed), score, *spent, f"{took['rounds']:g}"]


def _commands(result: Result) -> Iterator[tuple[str, str]]:
    study = result.study
    if study.name != NAME:
        yield "Run it again: what is finished stays", study_command(study)
    if command := compare_command(result):
        yield "Compare these runs", command
        if study.target is None:
            value = f"{max(row.mean for row in result.rows):.2g}"
            yield "Ask what a score costs", compare_command(result, value)
