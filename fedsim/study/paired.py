"""Compares the runs of a sweep with each other, seed by seed, and says which differences are significant."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from devices.errors import FileError, unknown
from fedsim.errors import ConfigError
from fedsim.report.rounds import RoundReport, running_costs
from fedsim.report.split import primary_of
from fedsim.workloads.metrics import ACCURACY, NOT_FINITE, Metric

SIGNIFICANT = 0.05
TENTH = 10  # of the rounds make a score
FEWEST = 3  # seeds that an interval needs


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds only.

    Attributes:
        label: the method, and the settings that tell it from other rows of that method.
        scores: by seed, mean of the metric over a run's last evaluations.
        difference: mean over the seeds in common of the score less that of the row compared with; nan without any.
        half_width: of its 95 % interval (Student's t), for this difference alone; infinite for a single seed.
        p: of the paired t test that the difference is 0; nan for a single seed, and for the row compared with.
        p_holm: p after Holm's correction for the comparisons of the table.
        simulated_s, joules, traffic_bytes, rounds: means over the seeds.
        metric: what the scores are values of.
        spans: of each run the first and last of the rounds that are scored, how many, and the last of the run.
        elsewhere: seeds in common that have no difference, since the runs were judged on other test data.
    """

    label: str
    scores: dict[int, float]
    difference: float
    half_width: float
    simulated_s: float
    joules: float
    traffic_bytes: float
    rounds: float
    p: float = math.nan
    p_holm: float = math.nan
    metric: Metric = ACCURACY
    spans: frozenset[tuple[int, int, int, int]] = frozenset()
    elsewhere: frozenset[int] = frozenset()

    @property
    def is_early(self) -> bool:
        """Returns whether the scores reach back before the middle of every run."""
        return bool(self.spans) and all(2 * first <= end for first, _, _, end in self.spans)

    @property
    def is_significant(self) -> bool:
        """Returns whether p is below 0.05 when all comparisons of the table are counted."""
        return self.p_holm < SIGNIFICANT

    @property
    def mean(self) -> float:
        """Returns the mean of the scores."""
        return float(np.mean(list(self.scores.values())))

    @property
    def deviation(self) -> float:
        """Returns the standard deviation of the scores over the seeds (n - 1); nan for a single one."""
        return float(np.std(list(self.scores.values()), ddof=1)) if len(self.scores) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the difference."""
        return self.difference - self.half_width, self.difference + self.half_width

    @property
    def interval_text(self) -> str:
        """Returns the interval in the unit of the metric."""
        return " to ".join(map(self.metric.change, self.interval))


def common_metric(folders: Sequence[Path]) -> Metric:
    """Returns the metric that the models of all these runs are judged by; accuracy where there are no runs.

    Raises:
        ConfigError: if there are several, or a run cannot be read.
    """
    found: dict[Metric, Path] = {}
    for folder in folders:
        try:
            found.setdefault(primary_of(folder), folder)
        except FileError as error:
            raise ConfigError(f"{folder} is not a run that can be read: {error}") from error
    if len(found) > 1:
        (one, here), (other, there) = list(found.items())[:2]
        raise ConfigError(
            f"{here} is judged by {one.label} and {there} by {other.label}, which cannot be compared; leave one out"
        )
    return next(iter(found), ACCURACY)


def compare_rows(
    groups: Mapping[str, Mapping[int, list[RoundReport]]],
    last: int | None,
    against: str,
    metric: Metric = ACCURACY,
    elsewhere: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> list[Row]:
    """Returns a row per label, in their order.

    Args:
        groups: by label and seed, the rounds of a run.
        last: evaluations that make a score; those of the last tenth of the rounds when None.
        against: label of the row that all are compared with; where it has no runs there are no differences.
        metric: of the rounds, that makes a score.
        elsewhere: by label, seeds whose runs were judged on other test data than those of `against`.

    Raises:
        ConfigError: if a run has no such metric.
    """
    base = {seed: score(rounds, last, metric.name) for seed, rounds in groups.get(against, {}).items()}
    found = []
    for label, group in groups.items():
        other = frozenset(elsewhere.get(label, ()))
        own = {seed: value for seed, value in base.items() if seed not in other}
        found.append(replace(_row(label, group, own, last, metric), elsewhere=other))
    found = [replace(row, p=math.nan) if row.label == against else row for row in found]
    return [replace(row, p_holm=p) for row, p in zip(found, holm([row.p for row in found]), strict=True)]


def holm(values: Sequence[float]) -> list[float]:
    """Corrects p values for their number: the smallest times that, the next times one less, never falling.

    Args:
        values: nan is no comparison, and stays.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.
    """
    places = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    corrected, largest = list(values), 0.0
    for number, place in enumerate(places):
        largest = max(largest, min(1.0, (len(places) - number) * values[place]))
        corrected[place] = largest
    return corrected


def correction(rows: Sequence[Row]) -> str:
    """Returns a table's caption on its comparisons; empty where none has a p."""
    count = sum(not math.isnan(row.p) for row in rows)
    if count > 1:
        star = "*:" if any(row.is_significant for row in rows) else "none has"
        return f"intervals: of one difference each; {star} p < {SIGNIFICANT} after Holm's correction for {count}"
    few = max((len(row.scores) for row in rows), default=0)
    if not count and len(rows) > 1 and few < FEWEST:
        return f"{few} seed{'s' if few > 1 else ''}: no interval"
    return f"*: p < {SIGNIFICANT}" if any(row.is_significant for row in rows) else ""


def unmatched(rows: Sequence[Row], against: str) -> list[str]:
    """Returns a line for rows whose runs are not matched by those of the row that they are compared with."""
    base = next((set(row.scores) for row in rows if row.label == against), set())
    common = {row.label: base & set(row.scores) - row.elsewhere for row in rows if base}
    none = [row for row in rows if base and not common[row.label]]
    other = [row.label for row in none if row.elsewhere]
    alone = [row.label for row in none if not row.elsewhere]
    lines = [f"no seed in common with {against}, so no difference: {', '.join(alone)}"] if alone else []
    lines += [f"judged on other test data than {against}, so no difference: {', '.join(other)}"] if other else []
    for row in rows:
        if common.get(row.label) and (row.elsewhere or set(row.scores) != base):
            what = "seeds in common and judged on the same test data" if row.elsewhere else "seeds in common"
            lines.append(
                f"difference of {row.label}: over the {what}, {', '.join(map(str, sorted(common[row.label])))}"
            )
    return lines


def scored(rounds: list[RoundReport], last: int | None, metric: str = ACCURACY.name) -> list[RoundReport]:
    """Returns the evaluated rounds whose mean is a run's score: those of its last tenth, but one at least.

    Args:
        rounds: of a run.
        last: as many evaluations instead.
        metric: that makes the score.

    Raises:
        ConfigError: if there is no such metric.
    """
    found = [r for r in rounds if metric in r.metrics or NOT_FINITE in r.metrics]
    if not found:
        known = {name for r in rounds for name in r.metrics}
        raise ConfigError(unknown("metric of the runs", metric, sorted(known)))
    if last is not None:
        return found[-last:]
    end = rounds[-1].round
    return [r for r in found if r.round > end - math.ceil(end / TENTH)] or found[-1:]


def score(rounds: list[RoundReport], last: int | None, metric: str = ACCURACY.name) -> float:
    """Returns the mean of a metric over the `scored` rounds; nan where the model's output in one was not finite.

    Raises:
        ConfigError: if there is no such metric.
    """
    return float(np.mean([r.metrics.get(metric, math.nan) for r in scored(rounds, last, metric)]))


def span(rows: Sequence[Row]) -> str:
    """Returns a table's caption on the rounds that its scores are of, and a warning where they are early ones."""
    spans = {one for row in rows for one in row.spans}
    if not spans:
        return ""
    name = rows[0].metric.title
    if len(spans) > 1:
        text = f"{name}: {_last_of_each(sorted({count for _, _, count, _ in spans}))}"
    else:
        first, last, count, _ = next(iter(spans))
        text = (
            f"{name}: of round {last}"
            if count == 1
            else f"{name}: mean of rounds {first} {'and' if count == 2 else 'to'} {last}"
        )
    if early := [one for row in rows if row.is_early for one in sorted(row.spans)]:
        first, _, _, end = early[0]
        text += f"; it reaches back to round {first} of {end}, before the middle: a mean over learning, not of its end"
    return text


def _last_of_each(counts: Sequence[int]) -> str:
    """Returns how many evaluations make the scores of runs that are not of the same rounds."""
    least, most = counts[0], counts[-1]
    if most == 1:
        return "of the last evaluation of each run"
    many = f"{most} evaluations" if least == most else f"evaluations, {least} to {most},"
    return f"mean of the last {many} of each run"


def half_width_of(differences: list[float]) -> float:
    """Returns half the width of the 95 % interval of the mean difference; infinite for less than three."""
    return mean_with_interval(differences)[1] if len(differences) >= FEWEST else math.inf


def mean_with_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of differences, and half the width of its 95 % interval (Student's t); NaN for a single one."""
    from scipy.special import stdtrit  # scipy.stats, which calls it, takes a second to import

    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return mean, math.nan
    return mean, float(stdtrit(count - 1, 0.975) * np.std(differences, ddof=1) / count**0.5)


def p_value(differences: Sequence[float]) -> float:
    """Returns p of Student's two-sided t test that the mean difference is 0; nan for less than three."""
    from scipy.special import stdtr

    if len(differences) < FEWEST:
        return math.nan
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(len(differences) - 1, -abs(mean) / error))


def _row(
    label: str, group: Mapping[int, list[RoundReport]], base: dict[int, float], last: int | None, metric: Metric
) -> Row:
    scores = {seed: score(rounds, last, metric.name) for seed, rounds in group.items()}
    differences = [scores[seed] - base[seed] for seed in scores if seed in base]
    ends = [[costs[-1] for costs in running_costs(rounds).values()] for rounds in group.values()]
    seconds, joules, traffic, rounds = (float(np.mean(column)) for column in zip(*ends, strict=True))
    mean = float(np.mean(differences)) if differences else math.nan
    half, p = half_width_of(differences), p_value(differences)
    spans = {_span(scored(run, last, metric.name), run[-1].round) for run in group.values()}
    return Row(label, scores, mean, half, seconds, joules, traffic, rounds, p, metric=metric, spans=frozenset(spans))


def _span(found: Sequence[RoundReport], end: int) -> tuple[int, int, int, int]:
    return found[0].round, found[-1].round, len(found), end
