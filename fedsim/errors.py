"""Errors of the core that a user can act on; their text is one sentence that says what to change.

Wrong names get their sentence from `devices.errors.unknown`. The command line ends with code 2 for a UserError (nothing
ran), with 1 for a RunError (what was written so far stays).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from traceback import walk_tb

from devices.errors import UserError

# Who ends a process for reasons of its own: Ray's workers on SIGTERM, rich where nobody reads.
MAY_END = ("ray", "rich")


def in_words(error: BaseException) -> str:
    """Its class and its text on one line; a worker knows a failure again by it."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class ConfigError(UserError):
    """A setting that is wrong in itself or does not fit another one."""


class DataError(UserError):
    """Data that cannot be found or cannot be used as they are."""


class RunError(RuntimeError):
    """A run that cannot go on."""


class NotFiniteError(ArithmeticError):
    """A model's output that is NaN or infinite: it has no accuracy, though torch finds a largest among NaN."""


class ClientError(RunError):
    """A client that failed; the text names client, device, round and seed.

    Args:
        text: one sentence.
        traceback: where it happened, as text from the worker.
        instruction: what the client was sent (a `fedsim.messages.updates.Instruction`), to run it again alone.
    """

    def __init__(self, text: str, traceback: str = "", instruction: object = None):
        super().__init__(text)
        self.traceback, self.instruction = traceback, instruction


class ExitError(RunError):
    """Code of a user's that would have ended this process, e.g. by sys.exit."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP came: engines and run folders are closed on the way out, as after Ctrl-C.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = Signals(number)


@contextmanager
def no_exit() -> Iterator[None]:
    """Around code of a user's: what would end the process becomes an error like any other, an ExitError.

    Not around a `yield`: a generator that is closed sees a GeneratorExit, too.
    """
    try:
        yield
    except BaseException as raised:
        if (error := as_error(raised)) is raised:
            raise
        raise error from raised


def as_error(raised: BaseException, may_end: tuple[str, ...] = MAY_END) -> BaseException:
    """An ExitError for what would end the process and is none of ours; anything else as it is.

    Args:
        raised: with its traceback.
        may_end: packages whose SystemExit is passed on.
    """
    if isinstance(raised, Exception | KeyboardInterrupt | Terminated):
        return raised
    frames = [frame for frame, _ in walk_tb(raised.__traceback__)]
    frame = frames[-1] if frames else None
    root = str(frame.f_globals.get("__name__", "")).partition(".")[0] if frame else ""
    if isinstance(raised, SystemExit) and (frame is None or root in may_end):
        return raised
    place = f"{frame.f_code.co_filename}, line {frame.f_lineno}," if frame else "code"
    return ExitError(f"{place} would end this process ({in_words(raised).removesuffix(':')})")
