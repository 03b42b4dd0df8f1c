"""Runs what `fedsim run` is given: sweeps, and what has Hydra's own flags or settings, by way of Hydra."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from devices.writing import naming
from fedsim.cli.experiment import run_one
from fedsim.cli.sentences import shortened


def run_with_hydra(arguments: list[str]) -> None:
    """Composes the config and runs it; Hydra itself, which composes twice for it, is only called for what it adds."""
    from fedsim.settings.compose import compose
    from fedsim.settings.foreign import check_foreign
    from fedsim.settings.overrides import check_overrides, is_of_hydra, parsed

    flags, given = _split(arguments)
    overrides = check_overrides(given)
    flags = check_foreign(flags, overrides)
    if flags or any(is_of_hydra(text) or parsed(text).is_sweep_override() for text in overrides):
        _hand_over(flags, overrides)
    else:
        run_one(compose(given))


def _hand_over(flags: list[str], overrides: list[str]) -> None:
    """Hands over to Hydra, which composes the config and, with -m, expands the sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    from devices.writing import remove_empty
    from fedsim.settings.compose import one_sentence, resolve, search_path

    sweeping = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*flags, *overrides})
    if sweeping:
        _check_sweep(flags, overrides)
    # Exceptions must reach main(): Hydra would print them and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    summaries: list[tuple[list[str], dict[str, Any], Path]] = []
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
                settings = resolve(config, hydra_config.runtime.choices, mine)
            of_sweep = hydra_config.mode == RunMode.MULTIRUN
            if of_sweep:
                settings["out"] = str(Path(hydra_config.sweep.dir) / str(hydra_config.job.num))
            brief = _of_sweep(hydra_config.job.num, mine, overrides) if of_sweep else None
            summaries.append((mine, *run_one(settings, brief=brief)))
        except Exception as error:  # Hydra would print a line of its own before it passes the error on
            if sweeping:
                error.add_note(f"in run {hydra_config.job.num} of the sweep: {' '.join(mine)}")
            failures.append(error)

    made: list[Path] = []
    try:
        of_hydra = [*_hydra_settings(overrides, sweeping, made), *search_path(overrides)]
        left = [text for text in overrides if not text.startswith("hydra.searchpath=")]
        sys.argv = ["fedsim run", *left, *of_hydra, *flags]
        with one_sentence(overrides), naming(Path("multirun.yaml")) if sweeping else nullcontext():
            job()
    finally:
        remove_empty(made)
    if len(summaries) > 1:
        _show_sweep(summaries)
    if failures:
        raise failures[0]


def _of_sweep(number: int, of_run: list[str], overrides: list[str]) -> str:
    """Returns a line on a run of a sweep: its number, and the overrides of which others have other values."""
    from fedsim.settings.overrides import parsed

    swept = {parsed(text).key_or_group for text in overrides if parsed(text).is_sweep_override()}
    told = [text for text in of_run if text.lstrip("+").partition("=")[0] in swept]
    return f"run {number}: {' '.join(told)}" if told else f"run {number}"


def _show_sweep(summaries: list[tuple[list[str], dict[str, Any], Path]]) -> None:
    """Prints the comparison of a sweep's runs and writes it beside them; a plain table where there is none."""
    from fedsim.cli.compare import show
    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console
    from fedsim.report.text import sweep_table
    from fedsim.study.compare import compare

    folders = [folder for _, _, folder in summaries]
    try:
        result = compare(folders)
    except ConfigError as error:
        console().print(sweep_table([(overrides, summary) for overrides, summary, _ in summaries]))
        console().say(f"no comparison: {error}")
        return
    show(result, folders[0].parent, console())


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns Hydra's own flags, and the overrides, which may stand between them.

    Raises:
        ConfigError: for a flag that Hydra does not have, or flags that exclude each other.
    """
    from hydra._internal.utils import get_args_parser

    from fedsim.errors import ConfigError

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{shortened(message, arguments)} (see fedsim run --help)")

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
    from fedsim.runs.pairs import try_out
    from fedsim.settings.compose import compose
    from fedsim.settings.foreign import is_foreign
    from fedsim.settings.overrides import sweep_overrides

    if is_foreign(flags):
        return  # another config tree: its runs are checked one by one
    for number, run_overrides in enumerate(sweep_overrides(overrides)):
        try:
            try_out(compose(run_overrides))
        except ValueError as error:
            error.add_note(f"in run {number} of the sweep: {' '.join(run_overrides)}")
            raise


def _hydra_settings(overrides: list[str], sweeping: bool, made: list[Path]) -> list[str]:
    """Keeps Hydra from folders and logs of its own, and makes the folder of a sweep: `out` or a dated one."""
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
