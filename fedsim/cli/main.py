"""The `fedsim` command. The outermost module: it alone imports `clients.app`, and nothing imports it.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

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
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from devices.texts import SENTENCE_LETTERS, VALUE_LETTERS, visible
from devices.writing import naming
from fedsim.cli.averages import averages
from fedsim.cli.devices.main import app as devices_app
from fedsim.cli.flower import flwr
from fedsim.cli.options import MOST, check_folder_place, check_picture
from fedsim.cli.options import whole as _whole
from fedsim.cli.paired import paired
from fedsim.cli.study import study
from fedsim.engines.leash import tie
from fedsim.errors import Terminated, as_error
from fedsim.report import strict_json
from fedsim.runs.experiment import build_engine, run_experiment

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Federated and on-device learning judged as an edge workload: accuracy against simulated time, energy, memory "
    "and bytes.",
    epilog="Start with: [bold]fedsim run[/bold]",
)
data_app = typer.Typer(no_args_is_help=True, help="What there is to learn from, and how it is split over clients.")
app.add_typer(data_app, name="data")
app.add_typer(devices_app, name="devices")

INTERRUPTED, CLOSED_PIPE = 130, 141
OUTPUT = "standard output"
MAY_END = ("argparse", "click", "fedsim", "hydra", "ray", "rich", "typer")  # these have said all, as --version does
ENDED_BY = {signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}
_folders: list[Path] = []  # of the run that is going on
BUILDING = ("run", "resume", "replay", "study", "flwr", "data", "devices")  # commands that make what a file names
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
RUN_EPILOG = """
[bold]Examples[/bold]

fedsim run

fedsim run method=fedprox fleet=mixed rounds=50 seed=3

fedsim run workload=mnist_writers cohort=20 deadline_s=30 out=runs/deadline

fedsim run -m strategy=fedavg,fedadam seed=1,2,3

fedsim run --config-path $PWD/runs/A --config-name config out=B     (repeats run A)

[bold]Settings[/bold]: rounds= seed= cohort= num_clients= over_selection= deadline_s= target_accuracy= max_simulated_s=
patience_rounds= evaluate_every= evaluate_clients= checkpoint_s= on_client_error= out= name=

[bold]Code[/bold]: a _target_ may name fedsim's own classes, Flower's strategies, torch.nn, torchvision.models, plug-ins
and modules of the working folder; anything else is named once more with --allow-target NAME, here and with resume,
replay, study and flwr.

[bold]Groups[/bold]: {groups}

Anything below a group can be set too, e.g. trainer.lr=0.05 partition.classes_per_client=3; the whole tree is printed by
fedsim run --cfg job
"""


def _groups() -> str:
    from fedsim.settings.groups import GROUPS, options

    return "\n\n".join(f"{group}= {' '.join(options(group))}" for group in GROUPS if options(group))


class _RunCommand(typer.core.TyperCommand):
    """Fills the option names into the help only when it is asked for."""

    def get_help(self, ctx: Any) -> str:
        self.epilog = RUN_EPILOG.format(groups="\n\n" + _groups())
        return super().get_help(ctx)


@app.command(cls=_RunCommand, context_settings=PASS_THROUGH, epilog=RUN_EPILOG)
def run(ctx: typer.Context) -> None:
    """Run one experiment, or a sweep with -m. Overrides have Hydra's syntax: KEY=VALUE."""
    _hydra_run(ctx.args)


app.command(context_settings=PASS_THROUGH)(flwr)
app.command()(paired)
app.command(context_settings=PASS_THROUGH)(study)
data_app.command("averages", context_settings=PASS_THROUGH)(averages)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Model config to train.")] = "lenet5",
    rounds: Annotated[int, typer.Option(help="Rounds per side; the sides take turns.", min=2, max=MOST)] = 30,
    engines: Annotated[str, typer.Option(help="Engines to measure.")] = "local,ray",
    workers: Annotated[int, typer.Option(help="Workers of ray; 0: one per core.", min=0, max=4096)] = 0,
    population: Annotated[str, typer.Option(help="Also time rounds with these numbers of clients.")] = "",
    cohort: Annotated[str, typer.Option(help="Also time rounds with these cohorts.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the engines' overhead: client updates per second beside bare PyTorch loops doing the same steps.

    Example: fedsim bench --engines local --population 1000,1000000 --cohort 100
    """
    from devices.errors import unknown
    from fedsim.cli.bench import bench as measure
    from fedsim.cli.bench import table
    from fedsim.errors import ConfigError
    from fedsim.settings.groups import options

    names = [name for name in engines.split(",") if name]
    for name in names or [engines]:
        if name not in options("engine"):
            raise ConfigError(unknown("engine", name, options("engine")))
    populations, cohorts = (
        [_whole(flag, text) for text in given.split(",")] if given else []
        for flag, given in (("--population", population), ("--cohort", cohort))
    )
    result = measure(build_engine, model, rounds, names, workers or None, populations, cohorts)
    if as_json:
        print(strict_json.dumps(result))
    else:
        for shown in table(result):
            _console().print(shown)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    round: Annotated[int, typer.Option(help="Round, from 1.", min=1, max=10**7)],
    client: Annotated[int, typer.Option(help="Client id.", min=0, max=10**9)],
) -> None:
    """Run just one client of one round again, in this process, and print its metrics or its traceback.

    A client that stopped the run starts at once: what it was sent was kept. For any other, the rounds before are run
    again first.

    Example: fedsim replay runs/20261121-101500-fedavg-digits --round 3 --client 17
    """
    from rich.progress import track

    from fedsim.runs.replay import instruction_of, settings_of
    from fedsim.runs.replay import replay as again
    from fedsim.settings.trust import keep_out

    keep_out(run)
    settings = settings_of(run)
    console, engine = _console(), build_engine(settings)
    bar = iter(track(range(round), "rounds before", console=console, transient=True, disable=round == 1))
    instruction = instruction_of(settings, engine, run, round, client, lambda _: next(bar, None))
    result = again(settings, engine, instruction)
    if result.traceback:
        print(result.traceback, end="", file=sys.stderr)
    reason = f": {result.reason}" if result.reason else ""
    console.print(f"client {client} in round {round}: {result.outcome}{reason}", highlight=False, soft_wrap=True)
    for name, value in result.metrics.items():
        console.print(f"  {name} {value:.6g}", highlight=False)
    raise typer.Exit(0 if result.outcome == "completed" else 1)


@app.command(context_settings=PASS_THROUGH)
def resume(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted, killed or has failed.")],
) -> None:
    """Go on with a run from its last checkpoint, to the same result as if it had never stopped.

    Its engine may be another one; everything else is as it was, the data too. A run without a checkpoint starts anew.

    Example: fedsim resume runs/20261121-101500-fedavg-digits engine=ray engine.workers=2
    """
    from fedsim.runs.recorded import settings_of_run
    from fedsim.settings.compose import check_address, on_engine
    from fedsim.settings.trust import keep_out

    keep_out(run)
    settings = on_engine(settings_of_run(run), ctx.args)
    check_address(settings, ctx.args, str(run / "config.yaml"))
    if (run / "summary.json").exists():
        _console().print(f"{run} has finished: {_completed(run)}", highlight=False, soft_wrap=True)
        return
    run_one(settings, run)


def _completed(run: Path) -> str:
    """Does the last steps of a run that was killed before them; says what it did."""
    from fedsim.report.files import read_summary
    from fedsim.report.page import page_is_whole, write_page
    from fedsim.report.place import RESERVE, remove_unfinished
    from fedsim.runs.checkpoint import Checkpoints

    read_summary(run)
    remove_unfinished(run)
    (run / RESERVE).unlink(missing_ok=True)
    Checkpoints(run, None).keep(1)
    if page_is_whole(run):
        return "nothing is left to do"
    return f"only its page was missing, {write_page(run)}"


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of the run.")]) -> None:
    """Write the page of a run anew, as far as it is: report.html in its folder, which needs nothing else.

    Example: fedsim report runs/20261121-101500-fedavg-digits
    """
    from fedsim.report.page import write_page
    from fedsim.runs.recorded import settings_of_run

    settings_of_run(run)
    check_folder_place("RUN", run)
    _console().print(f"page: {write_page(run)}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Check this installation: versions, GPU, data, writable folders, and a run of a few seconds.

    Example: fedsim doctor
    """
    from fedsim.cli.doctor import examine

    raise typer.Exit(examine(_console(), build_engine))


@data_app.command("list")
def data_list() -> None:
    """List the workloads, and whether their data are here.

    Example: FEDSIM_DATA=/data/bundles fedsim data list
    """
    from fedsim.report.text import workload_table
    from fedsim.settings.catalogue import list_workloads

    _console().print(workload_table(list_workloads()))


@data_app.command("describe", context_settings=PASS_THROUGH)
def data_describe(
    ctx: typer.Context,
    picture: Annotated[Path, typer.Option(help="Where the picture of the split goes.")] = Path("split.png"),
    limit: Annotated[int, typer.Option(help="Clients in the table.", min=1, max=MOST)] = 20,
) -> None:
    """Show how the examples are split over clients, as a table and a picture; takes the overrides of `fedsim run`.

    Example: fedsim data describe workload=digits partition=dirichlet partition.alpha=0.1 --picture split.png
    """
    import json

    from fedsim.report.text import split_table
    from fedsim.settings.build import build_world
    from fedsim.settings.compose import compose
    from fedsim.workloads.describe import split_picture, summary_lines
    from fedsim.workloads.describe import split_table as split_rows

    check_picture(picture)
    settings = {**compose(ctx.args), "cohort": 1, "evaluate_clients": 0}  # a split of any size can be looked at
    workload = build_world(json.dumps(settings)).workload
    split_picture(workload, picture)
    console = _console()
    console.print(split_table(split_rows(workload, limit), workload.num_clients))
    for line in summary_lines(workload):
        console.print(line, highlight=False)
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the console script: one sentence and an exit code for everything a user can mend."""
    from click import exceptions

    from devices.errors import UserError
    from fedsim.errors import RunError

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
    _folders.clear()
    output, warnings.showwarning, named = _piped_output(), _warn, sys.argv[1:]
    try:
        _check_working_folder()
        code = app(_with_trust(sys.argv[1:]), standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as end:  # rich's and click's answer to a closed pipe, without a word
        if _has_no_reader(output):
            _give_up(f"nobody reads the output any more (closed pipe); {_what_stays()}", CLOSED_PIPE, None)
        if (ended := as_error(end, MAY_END)) is end:
            raise
        _give_up(str(ended), 1, end)
    except getattr(exceptions, "NoArgsIsHelpError", ()) as error:  # not in click 8.1
        error.show()
        sys.exit(2)
    except exceptions.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "fedsim")
        _give_up(f"{_shortened(error.format_message(), named)} (see {command} --help)", 2, error)
    except UserError as error:
        _give_up(str(error), 2, error)
    except RunError as error:
        _give_up(str(error), 1, error)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        if _has_no_reader(output):
            _give_up(f"nobody reads the output any more (closed pipe); {_what_stays()}", CLOSED_PIPE, None)
        if error.filename == OUTPUT:
            _give_up(f"{OUTPUT} cannot be written: {error.strerror}; {_what_stays()}", 1, error)
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and (argument := _naming(str(error.filename), named)):
            _give_up(f"{argument} names no file or folder: {error.strerror}", 2, error)
        stays = f"; {_what_stays()}" if _folders else ""
        _give_up(f"{error.strerror or type(error).__name__}{where}{stays}", 1, error)
    except (exceptions.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Terminated as error:
        _give_up(f"{ENDED_BY[error.number]}; {_what_stays()}", 128 + error.number, None)
    except BaseException as end:
        if (ended := as_error(end)) is end:
            raise
        _give_up(str(ended), 1, end)
    if code == INTERRUPTED:  # click's own answer to Ctrl-C
        _give_up(f"interrupted; {_what_stays()}", INTERRUPTED, None)
    sys.exit(code if isinstance(code, int) else 0)


def _open_closed_streams() -> None:
    """What was closed for this process (`>&-`) leads nowhere: else its number goes to the next file that is opened."""
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
    """Libraries end the process, or say less, where it has been removed."""
    from fedsim.errors import ConfigError

    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working folder is not there any more ({error.strerror}); change to another") from error


def _shortened(text: str, arguments: list[str]) -> str:
    """A sentence of a parser's with what was typed at great length cut short, so that its end can be read."""
    for argument in arguments:
        for typed in (argument, argument.partition("=")[2], *argument.split("=")):
            if len(typed) > VALUE_LETTERS:
                for said in (typed, repr(typed)[1:-1]):
                    text = text.replace(said, visible(said, VALUE_LETTERS))
    return text


def _naming(path: str, arguments: list[str]) -> str:
    """The argument that names a path, with its option, as a sentence shows it; empty where none does."""
    before = ""
    for argument in arguments:
        option, _, value = argument.partition("=") if argument.startswith("-") else (before, "", argument)
        if any(part and part in Path(path).parts for part in (value, *re.split("[/:]", value), f"{value}.yaml")):
            return visible(f"{option}={value}" if option.startswith("-") else value, VALUE_LETTERS)
        before = argument
    return ""


def _with_trust(arguments: list[str]) -> list[str]:
    """The arguments without `--allow-target NAME`, which may stand anywhere behind the commands of BUILDING."""
    from fedsim.errors import ConfigError
    from fedsim.settings.trust import FLAG, begin

    allowed: list[str] = []
    left: list[str] = []
    given = iter(arguments if arguments[:1] and arguments[0] in BUILDING else [])
    for argument in given:
        flag, _, name = argument.partition("=")
        if flag == FLAG:
            allowed.append(name or next(given, ""))
            if not allowed[-1] or allowed[-1].startswith("-"):
                raise ConfigError(f"{FLAG} needs a name, as it stands behind _target_")
        else:
            left.append(argument)
    begin(allowed)
    return left or arguments


def _terminate(number: int, _: object) -> NoReturn:
    for other in ENDED_BY:
        signal.signal(other, signal.SIG_IGN)  # a second one would cut the closing short
    raise Terminated(number)


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning of ours is a sentence, too; those of libraries say where they come from."""
    text = str(message) if category is UserWarning else warnings.formatwarning(message, category, filename, lineno)
    with suppress(OSError):
        print(f"fedsim: warning: {' '.join(text.split())}", file=sys.stderr)


def _piped_output() -> int | None:
    """Another name of standard output where it is a pipe: the libraries that print may close theirs."""
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
    go_on = [f"; go on with: fedsim resume {shlex.quote(str(f))}" for f in _folders if (f / "config.yaml").is_file()]
    return "everything written so far stays" + "".join(go_on)


def _give_up(text: str, code: int, error: BaseException | None) -> None:
    if error is not None and os.environ.get("FEDSIM_TRACEBACK") == "1":
        import traceback

        print(getattr(error, "traceback", ""), file=sys.stderr)
        traceback.print_exception(error)
    notes = "; ".join(["", *getattr(error, "__notes__", ())])
    sentence = visible(" ".join((text + notes).split()), SENTENCE_LETTERS)
    with suppress(OSError):
        print(f"fedsim: {sentence}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # else Python says so too, at its very end
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


# --- running -------------------------------------------------------------------------------------------------------


def _hydra_run(arguments: list[str]) -> None:
    """Hands over to Hydra, which composes the config and, with -m, expands the sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    from devices.writing import remove_empty
    from fedsim.settings.compose import check_overrides, one_sentence, resolve, search_path
    from fedsim.settings.foreign import check_foreign

    flags, given = _split(arguments)
    overrides = check_overrides(given)
    flags = check_foreign(flags, overrides)
    sweeping = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*flags, *overrides})
    if sweeping:
        _check_sweep(flags, overrides)
    # Exceptions must reach main(): Hydra would print them and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    summaries: list[tuple[list[str], dict[str, Any]]] = []
    failures: list[Exception] = []

    @hydra.main(version_base="1.3", config_path="pkg://configs", config_name="run")
    def job(config: DictConfig) -> None:
        if failures:
            return
        hydra_config = HydraConfig.get()
        mine = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        assert isinstance(mine, list)
        try:
            with one_sentence(overrides):
                settings = resolve(config, hydra_config.runtime.choices)
            if hydra_config.mode == RunMode.MULTIRUN:
                settings["out"] = str(Path(hydra_config.sweep.dir) / str(hydra_config.job.num))
            summaries.append((mine, run_one(settings)))
        except Exception as error:  # Hydra would print a line of its own before it passes the error on
            if sweeping:
                error.add_note(f"in run {hydra_config.job.num} of the sweep: {' '.join(mine)}")
            failures.append(error)

    made: list[Path] = []
    try:
        of_hydra = [*_hydra_settings(overrides, sweeping, made), *search_path()]
        sys.argv = ["fedsim run", *overrides, *of_hydra, *flags]
        with one_sentence(overrides), naming(Path("multirun.yaml")) if sweeping else nullcontext():
            job()
    finally:
        remove_empty(made)
    if len(summaries) > 1:
        from fedsim.report.text import sweep_table

        _console().print(sweep_table(summaries))
    if failures:
        raise failures[0]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's own flags, and the overrides, which may stand between them.

    Raises:
        ConfigError: for a flag that Hydra does not have, or flags that exclude each other.
    """
    from hydra._internal.utils import get_args_parser

    from fedsim.errors import ConfigError

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{_shortened(message, arguments)} (see fedsim run --help)")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    known = parser.parse_intermixed_args(arguments)
    if known.experimental_rerun:
        refuse("--experimental-rerun would unpickle a file; repeat a run with --config-path RUN --config-name config")
    commands = [name for name in ("cfg", "multirun", "info", "run", "shell_completion") if getattr(known, name)]
    if len(commands) > 1:
        refuse(f"only one of --{' and --'.join(commands)} can be given")
    if known.resolve and not known.cfg:
        refuse("--resolve goes with --cfg only")
    overrides = list(known.overrides)
    flags: list[str] = []
    left = list(overrides)
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            flags.append(argument)
    return flags, overrides


def _check_sweep(flags: list[str], overrides: list[str]) -> None:
    """Refuses a sweep with a wrong setting in any of its runs before the first one starts."""
    from fedsim.settings.check import try_out
    from fedsim.settings.compose import compose, sweep_overrides
    from fedsim.settings.foreign import is_foreign

    if is_foreign(flags):
        return  # another config tree: its runs are checked one by one
    for number, run_overrides in enumerate(sweep_overrides(overrides)):
        try:
            try_out(compose(run_overrides))
        except ValueError as error:
            error.add_note(f"in run {number} of the sweep: {' '.join(run_overrides)}")
            raise


def _hydra_settings(overrides: list[str], sweeping: bool, made: list[Path]) -> list[str]:
    """Hydra writes no folder and no log of its own; a sweep's runs go below `out` or a dated folder, which is made."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from fedsim.report.place import make_sweep_folder, new_folder

    fixed = [
        "hydra.output_subdir=null",
        "hydra.run.dir=.",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
    ]
    if not sweeping:
        return fixed
    out = [a.split("=", 1)[1] for a in overrides if a.startswith("out=")]
    folder = out[-1] if out else new_folder(Path("runs"), "sweep", made)
    value = OverridesParser.create().parse_override(f"out={folder}").value() if out else None
    if isinstance(value, str) and "${" not in value:
        make_sweep_folder(Path(value), made)
    return [*fixed, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=."]  # run_one makes the folder of each run


def _begin(folder: Path) -> None:
    _folders[:] = [folder]


def run_one(settings: dict[str, Any], unfinished: Path | None = None) -> dict[str, Any]:
    """One experiment with its progress bar and closing table; `unfinished` is the folder that holds its beginning."""
    from fedsim.report.rounds import read_rounds
    from fedsim.report.text import closing_lines, closing_table

    console = _console()
    folder, summary = run_experiment(settings, console, unfinished, _begin)
    _folders.clear()
    reports = read_rounds(folder)
    console.print(closing_table(reports))
    for line in closing_lines(summary, folder, reports):
        console.print(line, highlight=False, soft_wrap=True)
    return summary


def _console() -> Any:
    from fedsim.report.text import console

    return console()


if __name__ == "__main__":
    main()
