"""The process around a command: its streams and signals, and the sentence and exit code that it ends with."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import signal
import stat
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from devices.errors import UserError
from devices.texts import SENTENCE_LETTERS, visible
from devices.writing import naming
from fedsim.cli.experiment import in_progress
from fedsim.cli.options import without_trust
from fedsim.cli.sentences import argument_naming, shortened
from fedsim.engines.leash import tie
from fedsim.errors import ConfigError, RunError, Terminated, as_error, in_words

INTERRUPTED, CLOSED_PIPE = 130, 141
OUTPUT = "standard output"
MAY_END = ("argparse", "click", "fedsim", "hydra", "ray", "rich", "typer")  # these have said all, as --version does
OURS = ("fedsim", "clients", "strategies", "devices", "configs")
ENDED_BY = {signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


def run_app(app: Callable[..., Any]) -> NoReturn:
    """Runs the command line and ends the process: one sentence and an exit code for everything a user can mend."""
    _prepare()
    output, typed = _piped_output(), sys.argv[1:]
    try:
        _check_working_folder()
        code = app(without_trust(typed), standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit | OSError) and _has_no_reader(output):  # rich and click end without a word
            _give_up(f"nobody reads the output any more; {_what_stays()}" if in_progress else "", CLOSED_PIPE)
        _end(error, typed)
    if code == INTERRUPTED:  # click's own answer to Ctrl-C
        _give_up(f"interrupted; {_what_stays()}", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _prepare() -> None:
    _open_closed_streams()
    for number in ENDED_BY:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    tie()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # texts may have letters that the terminal cannot show
    for name in ("write", "flush") if sys.stdout is not None else ():  # its faults are told apart from a file's
        setattr(sys.stdout, name, naming(Path(OUTPUT))(getattr(sys.stdout, name)))
    in_progress.clear()
    warnings.showwarning = _warn


def _end(error: BaseException, typed: list[str]) -> NoReturn:
    """Ends the process as an error asks for; passes on what is no user's to mend, or has said all."""
    from click import exceptions

    if isinstance(error, getattr(exceptions, "NoArgsIsHelpError", ())):  # not in click 8.1
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if isinstance(error, exceptions.ClickException):
        command = getattr(getattr(error, "ctx", None), "command_path", "fedsim")
        text = re.sub(r"( Did you mean [^?]*\?)\1+", r"\1", error.format_message())  # typer and click both ask
        _give_up(f"{shortened(text, typed)} (see {command} --help)", 2, error)
    if isinstance(error, UserError):
        _give_up(str(error), 2, error)
    if isinstance(error, RunError):
        _give_up(str(error), 1, error)
    if isinstance(error, OSError):
        _give_up(*_system_error(error, typed), error)
    if isinstance(error, exceptions.Abort | KeyboardInterrupt):
        _give_up(f"interrupted; {_what_stays()}", INTERRUPTED)
    if isinstance(error, Terminated):
        _give_up(f"{ENDED_BY[error.number]}; {_what_stays()}", 128 + error.number)
    ended = as_error(error, MAY_END) if isinstance(error, SystemExit) else as_error(error)
    if ended is not error:
        _give_up(str(ended), 1, error)
    if place := _place_in_own_code(error):
        stays = f"; {_what_stays()}" if in_progress else ""
        _give_up(f"{place}: {in_words(error)}; FEDSIM_TRACEBACK=1 shows the way there{stays}", 1, error)
    raise error


def _place_in_own_code(error: BaseException) -> str:
    """Returns the innermost place in code that is neither ours nor a library's; empty where there is none."""
    import sysconfig
    from traceback import walk_tb

    import fedsim

    root = Path(fedsim.__file__).resolve().parent.parent
    others = [root / name for name in OURS] + [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    others += [Path(sysconfig.get_path("platlib")), Path(sys.argv[0]).resolve()]
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        code = frame.f_code
        file = Path(code.co_filename)
        if file.is_absolute() and not any(file.is_relative_to(other) for other in others):
            return f"{file}, line {line}, in {code.co_name}"
    return ""


def _system_error(error: OSError, typed: list[str]) -> tuple[str, int]:
    """Returns the sentence and the exit code for what the system refused."""
    if error.filename == OUTPUT:
        return f"{OUTPUT} cannot be written: {error.strerror}; {_what_stays()}", 1
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and (argument := argument_naming(str(error.filename), typed)):
        return f"{argument} names no file or folder: {error.strerror}", 2
    where = f": {error.filename}" if error.filename else ""
    stays = f"; {_what_stays()}" if in_progress else ""
    return f"{error.strerror or type(error).__name__}{where}{stays}", 1


def _open_closed_streams() -> None:
    """Opens what was closed for this process (`>&-`) to nowhere: else the next file that is opened gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # may get the number itself
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def _check_working_folder() -> None:
    """Refuses a working folder that has been removed: libraries would end the process, or say less."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working folder is not there any more ({error.strerror}); change to another") from error


def _terminate(number: int, _: object) -> NoReturn:
    for other in ENDED_BY:
        signal.signal(other, signal.SIG_IGN)  # a second one would cut the closing short
    raise Terminated(number)


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Prints a warning of ours as a sentence, and one of a library with where it comes from."""
    text = str(message) if category is UserWarning else warnings.formatwarning(message, category, filename, lineno)
    with suppress(OSError):
        print(f"fedsim: warning: {' '.join(text.split())}", file=sys.stderr)


def _piped_output() -> int | None:
    """Returns a second descriptor of standard output where it is a pipe: libraries that print may close theirs."""
    with suppress(OSError, ValueError):
        descriptor = sys.stdout.fileno()
        return os.dup(descriptor) if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else None
    return None


def _has_no_reader(pipe: int | None) -> bool:
    import select

    if pipe is None:
        return False
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _what_stays() -> str:
    go_on = [f"; go on with: fedsim resume {shlex.quote(str(f))}" for f in in_progress if (f / "config.yaml").is_file()]
    return "everything written so far stays" + "".join(go_on)


def _give_up(text: str, code: int, error: BaseException | None = None) -> NoReturn:
    if error is not None and os.environ.get("FEDSIM_TRACEBACK") == "1":
        import traceback

        print(getattr(error, "traceback", ""), file=sys.stderr)
        traceback.print_exception(error)
    notes = "; ".join(["", *getattr(error, "__notes__", ())])
    if sentence := visible(" ".join((text + notes).split()), SENTENCE_LETTERS):
        with suppress(OSError):
            print(f"fedsim: {sentence}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # else Python says so too, at its very end
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
