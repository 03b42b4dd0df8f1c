"""Errors of the core that a user can act on; their text is one sentence that says what to change.

May import: nothing. Wrong names get their sentence from `devices.errors.unknown`. The command line ends with code 2 for
ConfigError and DataError (nothing ran), with 1 for RunError (what was written so far stays).
"""


def in_words(error: BaseException) -> str:
    """Its class and its text on one line; a worker knows a failure again by it."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class ConfigError(ValueError):
    """A setting that is wrong in itself or does not fit another one."""


class DataError(ValueError):
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
        instruction: what the client was sent (a `fedsim.messages.Instruction`), to run it again alone.
    """

    def __init__(self, text: str, traceback: str = "", instruction: object = None):
        super().__init__(text)
        self.traceback, self.instruction = traceback, instruction
