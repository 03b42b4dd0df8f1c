"""The door for Python to comparisons.

Example:
    found = fedsim.compare("runs/a", "runs/b", target=0.8)
    found.table[["arm", "mean", "simulated_s", "joules"]]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fedsim.study.results import Result


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        result: rows, scores and runs as the command has them.
    """

    result: Result

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per method and setting: scores, paired differences, and what a run took; costs of a target too."""
        import pandas as pd

        from fedsim.study.results import flat, records

        return pd.DataFrame(flat(records(self.result)))

    @property
    def differs(self) -> tuple[str, ...]:
        """The settings that differ, a line for each."""
        return self.result.study.differs

    def plot(self) -> Figure:
        """Draws the score against rounds, simulated time, energy and traffic, a line for each row."""
        from fedsim.report.plots.study import study_figure

        return study_figure(self.result)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(row.label for row in self.result.rows)})"

    def _repr_html_(self) -> str:
        """Returns a notebook's view: what differs, and the table."""
        import html

        said = filter(None, (*self.differs, self.result.study.left_out))
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in said)
        return lines + self.table.to_html(index=False, float_format=lambda value: f"{value:.4g}")


def compare(
    *runs: str | os.PathLike[str], target: float | None = None, against: str | None = None, last: int | None = None
) -> Comparison:
    """Compares runs that are there, as `fedsim compare` does; writes nothing.

    Args:
        runs: of `fedsim.run`, or folders of runs, sweeps or studies, or patterns of such.
        target: value of the metric whose cost is asked for.
        against: label (or its beginning) of the row that the others are compared with; the first when None.
        last: evaluations that make a score; those of the last tenth of the rounds when None.

    Raises:
        ConfigError: if there are no runs, or they cannot be compared.
    """
    from fedsim.study.compare import compare as compared

    return Comparison(compared(map(Path, runs), last, against, target))
