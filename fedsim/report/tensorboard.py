"""TensorBoard's event files of a run, written in this thread: a disk that is full is seen where it happens.

The format and its checksums are TensorBoard's own code.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.writing import naming
from fedsim.report.place import remove
from fedsim.report.rounds import RoundReport
from fedsim.report.scalars import Spent, hyperparameters, of_end, of_round
from fedsim.settings.groups import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RGBA = 4  # TensorBoard's number for the colours of a PNG with transparency
SPENT, FINAL = "spent", "final"  # below the events by rounds: against what was spent, and hyperparameters


class Board:
    """TensorBoard's folder of a run, in which each folder with events is a "run" with a name of its own.

    `LABEL/` has the curves by rounds with simulated time as wall time, which makes the "relative" axis that of the
    devices; `LABEL/spent/` has metrics with what was spent in the place of the step; `LABEL/final/` has settings and
    figures of a run that has ended. What is not by rounds is written anew by a run that goes on.

    Args:
        folder: of the events.
        label: names the run; one that goes on keeps what it has.
        shown: metrics that are drawn against what was spent.
        before: the rounds that are there already; None for a new run.
    """

    def __init__(self, folder: Path, label: str, shown: Collection[str], before: Sequence[RoundReport] | None):
        self.folder = folder / label if before is None else _folder_before(folder, label)
        self.shown, self.spent = shown, Spent()
        for name in (SPENT, FINAL):
            remove(self.folder / name)
        self._rounds = Events(self.folder, purge_step=None if before is None else len(before))
        self._spent = Events(self.folder / SPENT)
        for report in before or ():
            self._add_spent(report)

    def add(self, report: RoundReport) -> None:
        """Writes a round."""
        self._add_spent(report)
        self._rounds.scalars(of_round(report, self.spent), report.round, report.now_s)

    def _add_spent(self, report: RoundReport) -> None:
        self.spent.add(report)
        shown = {key: value for key, value in report.metrics.items() if key in self.shown}
        for axis, step in self.spent.axes.items() if shown else ():
            self._spent.scalars({f"by_{axis}/{key}": value for key, value in shown.items()}, step, report.now_s)

    def histogram(self, tag: str, values: Sequence[float], step: int, wall_s: float) -> None:
        """Adds how many of whole numbers there are of each."""
        self._rounds.histogram(tag, values, step, wall_s)

    def picture(self, tag: str, figure: Figure, png: bytes, step: int, wall_s: float) -> None:
        """Adds a drawn figure."""
        self._rounds.picture(tag, figure, png, step, wall_s)

    def finish(self, settings: Settings, summary: Mapping[str, Any]) -> None:
        """Adds settings and figures of the run that has ended."""
        final = Events(self.folder / FINAL)
        final.hyperparameters(hyperparameters(settings), time.time() - summary["host_s"], time.time())
        final.scalars(of_end(summary), summary["rounds"], summary["simulated_s"])
        final.close()

    def flush(self) -> None:
        """Hands everything so far to the system."""
        for events in (self._rounds, self._spent):
            events.flush()

    def close(self) -> None:
        """Closes the files."""
        for events in (self._rounds, self._spent):
            events.close()


def _folder_before(folder: Path, label: str) -> Path:
    """Returns where the events of a run are that goes on; fedsim 0.1 had them in the folder itself."""
    if any(folder.glob("events.*")):
        return folder
    there = [path for path in folder.glob("*") if path.is_dir()]
    return there[0] if len(there) == 1 else folder / label


class Events:
    """An open event file; every process that goes on with a run begins one of its own.

    Args:
        folder: where it goes; made here.
        purge_step: the first step that is written anew: readers drop it and those after it from earlier files.

    Raises:
        OSError: naming the file, here and in every method.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        folder.mkdir(exist_ok=True, parents=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{platform.node()}.{os.getpid()}"
        numbered = (folder / f"{name}.{number}" for number in range(10**6))
        self.path = next(path for path in numbered if not path.exists())
        self._file = self.path.open("xb")
        self._records: Any = RecordWriter(self._file)
        self._write(time.time(), file_version="brain.Event:2")
        if purge_step is not None:
            self._write(time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int, wall_s: float) -> None:
        """Adds numbers by their tags, all in one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        every = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(wall_s, step=step, summary=every)

    def histogram(self, tag: str, values: Sequence[float], step: int, wall_s: float) -> None:
        """Adds how many of whole numbers there are of each."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        counts = Counter(map(round, values))
        numbers = range(min(counts), max(counts) + 1)
        proto = HistogramProto(
            min=min(values),
            max=max(values),
            num=len(values),
            sum=sum(values),
            sum_squares=sum(value * value for value in values),
            bucket_limit=[number + 0.5 for number in numbers],
            bucket=[counts[number] for number in numbers],
        )
        self._write(wall_s, step=step, summary=Summary(value=[Summary.Value(tag=tag, histo=proto)]))

    def picture(self, tag: str, figure: Figure, png: bytes, step: int, wall_s: float) -> None:
        """Adds a drawn figure."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = figure.canvas.get_width_height()
        image = Summary.Image(height=height, width=width, colorspace=RGBA, encoded_image_string=png)
        self._write(wall_s, step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def hyperparameters(self, values: Mapping[str, bool | float | str], began_s: float, ended_s: float) -> None:
        """Adds the settings of a run that has ended, for the HPARAMS tab."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2  # type: ignore[import-untyped]
        from tensorboard.plugins.hparams.api_pb2 import Status  # type: ignore[import-untyped]

        start = plugin_data_pb2.SessionStartInfo(start_time_secs=began_s)
        for key, value in values.items():
            if isinstance(value, bool):
                start.hparams[key].bool_value = value
            elif isinstance(value, str):
                start.hparams[key].string_value = value
            else:
                start.hparams[key].number_value = value
        end = plugin_data_pb2.SessionEndInfo(status=Status.Value("STATUS_SUCCESS"), end_time_secs=ended_s)
        parts = {metadata.SESSION_START_INFO_TAG: {"session_start_info": start}}
        for tag, part in (parts | {metadata.SESSION_END_INFO_TAG: {"session_end_info": end}}).items():
            about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**part))
            value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
            self._write(ended_s, summary=Summary(value=[value]))

    def flush(self) -> None:
        """Hands everything so far to the system."""
        with naming(self.path):
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with naming(self.path):
            self._file.close()

    def _write(self, wall_s: float, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with naming(self.path):
            self._records.write(Event(wall_time=wall_s, **content).SerializeToString())
