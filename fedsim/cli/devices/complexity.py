"""`fedsim devices train-complexity`: a measure of generalisation, and what it adds to the choice of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.devices.metad2a import Tasks
from fedsim.cli.devices.scores import by_name, mean
from fedsim.cli.options import MAX_COUNT, check_place

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedsim.meta.complexity import ComplexitySettings
    from fedsim.meta.judged_complexity import ComplexityScore
    from fedsim.meta.metad2a import MetaD2A
    from fedsim.meta.snapshots import TaskSnapshots
    from fedsim.meta.tasks import Part
    from fedsim.meta.trained_cells import TrainedCells


def train_complexity(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors): those of the first seed.")],
    predictor: Annotated[
        Path | None, typer.Option(help="Weights of `fedsim devices train-metad2a`, whose predictions are joined.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings to judge, each from the start.", min=1, max=100)] = 3,
    seed: Annotated[int, typer.Option(help="The first of the seeds.", min=0, max=MAX_COUNT)] = 0,
    cells: Annotated[int, typer.Option(help="Cells to learn from on each task, at most.", min=1, max=15625)] = 20,
    steps: Annotated[int, typer.Option(help="Of learning.", min=1, max=MAX_COUNT)] = 300,
    bank: Annotated[int, typer.Option(help="Snapshots to keep, the last ones.", min=1, max=MAX_COUNT)] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Learn to predict how far test loss will be above training loss, and judge by it cells on classes never seen.

    It needs a short training of each candidate and test images without labels. Cells of the tasks are trained once
    more, and what their networks say is kept in TASKS/snapshots. Goes on from there, and from OUT.SEED; the latter may
    be removed afterwards.

    Example: fedsim devices train-complexity --tasks tasks --out nc.safetensors --predictor metad2a.safetensors
    """
    from dataclasses import asdict

    import torch

    from fedsim.meta.complexity import ComplexitySettings
    from fedsim.meta.metad2a import MetaD2A
    from fedsim.meta.trained_cells import TrainedCells
    from fedsim.report import strict_json
    from fedsim.report.terminal import console

    check_place("--out", out)
    torch.set_num_threads(1)
    made = None if predictor is None else MetaD2A.load(predictor)
    trained, shown = TrainedCells.open(tasks), console()
    trainings = [ComplexitySettings(steps, bank=bank, seed=seed + number) for number in range(seeds)]
    scores, learning_s = _learn_and_judge(trained, trainings, out, made, cells)
    if as_json:
        print(strict_json.dumps([asdict(score) for score in scores]))
        return
    _show(scores, seeds)
    shown.note(f"learning: {learning_s / seeds:.0f} CPU s for each seed, after the trainings of cells")
    shown.say(f"weights: {out}")


def _learn_and_judge(
    trained: TrainedCells, trainings: Sequence[ComplexitySettings], out: Path, predictor: MetaD2A | None, cells: int
) -> tuple[list[ComplexityScore], float]:
    """Learns with each of the settings, writes the first weights, and returns all scores and the CPU seconds."""
    import time
    from dataclasses import asdict

    import torch

    from fedsim.meta.complexity import learn_complexity
    from fedsim.meta.fitting import Look
    from fedsim.meta.judged_complexity import judge_complexity
    from fedsim.report.terminal import console, work_bar

    scores: list[ComplexityScore] = []
    learning_s = 0.0
    with work_bar(console()) as progress:
        learned, valid, held_out = (
            _snapshots(trained, part, cells if part != "held_out" else None, progress)
            for part in ("train", "valid", "held_out")
        )
        held_out = [own.ends() for own in held_out]
        usual_gap = float(torch.cat([own.ends().gap for own in learned]).mean())
        bar = progress.add_task("learning", total=1)
        for settings in trainings:
            progress.update(bar, completed=0, total=settings.steps, description=f"seed {settings.seed}")

            def watch(look: Look) -> None:
                progress.update(bar, completed=look.step, description=f"left {-look.score:.3f}")

            began = time.process_time()
            made = learn_complexity(learned, valid, settings, out.with_name(f"{out.name}.{settings.seed}"), watch)
            learning_s += time.process_time() - began
            if settings is trainings[0]:
                made.save(out, {"settings": asdict(settings)})
            scores += judge_complexity(made, trained, held_out, settings.seed, usual_gap, predictor)
    return scores, learning_s


def _snapshots(trained: TrainedCells, part: Part, cells: int | None, progress: Progress) -> list[TaskSnapshots]:
    """Returns the snapshots of the first cells of each task of a part, or of all; trains what is missing."""
    from fedsim.meta.snapshots import Snapshots

    found, names = Snapshots(trained), trained.names(part)
    chosen = {name: trained.cells(name)[:cells] for name in names}
    bar = progress.add_task("training cells", total=sum(map(len, chosen.values())))
    taken = [
        found.of(name, own, lambda task: progress.update(bar, advance=1, description=task))
        for name, own in chosen.items()
    ]
    progress.remove_task(bar)
    return taken


def _show(scores: list[ComplexityScore], seeds: int) -> None:
    """Prints what cells may be ranked by, and how well gaps are predicted on each task; means over seeds."""
    import numpy as np

    from fedsim.meta.judged_complexity import RANKED_BY, correlation
    from fedsim.report.terminal import console, table
    from fedsim.study.paired import mean_with_interval

    grouped = by_name(scores)

    def means(what: Callable[[ComplexityScore], float]) -> list[float]:
        return [mean(own, what) for own in grouped.values()]

    shown, title = console(), f"Spearman with held-out accuracy on {len(grouped)} tasks, {seeds} seed(s)"
    rows = table(
        "cells ranked by", "needs", "mean", "worst", "beyond loss", left=("cells ranked by", "needs"), title=title
    )
    for key, needs in RANKED_BY.items():
        if key not in scores[0].spearman:
            continue
        each = means(lambda score, key=key: score.spearman[key])  # type: ignore[misc]
        more = np.subtract(each, means(lambda score: score.spearman["training loss"])).tolist()
        middle, half = mean_with_interval(more)
        beyond = f"{middle:+.2f} ± {half:.2f}" if len(more) > 1 else f"{middle:+.2f}"
        rows.add_row(key, needs, f"{np.mean(each):.2f}", f"{min(each):.2f}", "" if key == "training loss" else beyond)
    shown.print(rows)
    rows = table(
        "task", "Spearman", "R", "true gap", "error", "usual error", left=("task",), title="Predicted gaps, in nats"
    )
    columns = [
        means(lambda score: score.spearman["training loss + NC"]),
        means(lambda score: score.correlation),
        means(lambda score: float(np.mean(score.gap))),
        means(lambda score: score.error),
        means(lambda score: score.usual_error),
    ]
    for name, *figures in zip(grouped, *columns, strict=True):
        rows.add_row(name.removeprefix("held_out-"), *(f"{figure:.2f}" for figure in figures))
    rows.add_section()
    rows.add_row("mean", *(f"{np.mean(column):.2f}" for column in columns))
    shown.print(rows)
    shown.note(
        "NC is the predicted gap, test loss less training loss. It needs a short training of each cell, and test "
        "images without labels; labels only judge here. Usual error: of the mean gap on the tasks learned from."
    )
    by_seed = [[score for score in scores if score.seed == seed] for seed in sorted({score.seed for score in scores})]
    each_seed = ", ".join(f"{np.mean([s.spearman['training loss + NC'] for s in own]):.3f}" for own in by_seed)
    shown.note(f"Spearman of training loss + NC, by seed: {each_seed}")
    over_all = ", ".join(f"{correlation(own):.2f}" for own in by_seed)
    shown.note(f"R over the cells of all tasks, by seed: {over_all}")
