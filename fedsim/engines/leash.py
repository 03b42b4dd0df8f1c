"""Ends a process that another `fedsim` has started when that one is gone, also after a kill -9.

The starter holds the other end of the child's standard input, and writes nothing: when it can be read, nobody is there
any longer.
"""

from __future__ import annotations

import os
import signal
import threading
import time

TIED = "FEDSIM_TIED"  # set to 1 by the starter
END_S = 10.0  # host seconds to close a run folder


def tie() -> None:
    """Begins to watch, if this process was started so; what is started from here is not tied by it."""
    if os.environ.pop(TIED, "") == "1":
        threading.Thread(target=_watch, args=(os.dup(0),), name="leash", daemon=True).start()


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # closes the run folder on the way out
    time.sleep(END_S)
    os.kill(os.getpid(), signal.SIGKILL)
