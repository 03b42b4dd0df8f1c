"""TensorBoard's event file of a run, written in this thread: a disk that is full is seen where it happens.

The format and its checksums are TensorBoard's own code.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.writing import naming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RGBA = 4  # TensorBoard's number for the colours of a PNG with transparency


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

        folder.mkdir(exist_ok=True)
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

    def picture(self, tag: str, figure: Figure, png: bytes, step: int, wall_s: float) -> None:
        """Adds a drawn figure."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = figure.canvas.get_width_height()
        image = Summary.Image(height=height, width=width, colorspace=RGBA, encoded_image_string=png)
        self._write(wall_s, step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

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
