"""Networks in a Python file of the user's, named FILE.py:NAME: the file is run as a module of its own."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from devices.errors import one_line, unknown
from devices.reading import open_file, read_bytes
from fedsim.errors import ConfigError, no_exit

HEX_DIGITS = 16


def network(source: str, **settings: Any) -> nn.Module:
    """Makes the network that a file has under a name.

    Args:
        source: FILE.py:NAME; `fedsim.settings.build` completes a path to one of the user's working folder.
        settings: of the class or function.
    """
    made: nn.Module = named_in_file(source)[1](**settings)
    return made


def split_source(source: str) -> tuple[Path, str]:
    """Returns the file and the name of FILE.py:NAME; an empty name where it has none."""
    file, _, wanted = source.rpartition(":")
    return (Path(file), wanted) if file.endswith(".py") else (Path(source), "")


def named_in_file(source: str) -> tuple[str, Any]:
    """Runs a file, once in a process for what it says; returns the dotted path of what is named in it, and that itself.

    Raises:
        ConfigError: for a file or a name that is not there, with the nearest one, or what the file failed of.
        FileError: for what is no file.
    """
    path, wanted = split_source(source)
    module = _run_file(path)
    own = [key for key, value in vars(module).items() if not key.startswith("_") and _is_maker(value, module)]
    if not wanted:
        what = f"{path} holds models, and none is named"
        raise ConfigError(f"{what}; write {path}:NAME with one of {', '.join(own) or 'your own'}")
    if wanted not in vars(module):
        raise ConfigError(unknown(f"model in {path}:", wanted, own))
    return f"{module.__name__}.{wanted}", vars(module)[wanted]


def _is_maker(value: Any, module: ModuleType) -> bool:
    here = getattr(value, "__module__", None) == module.__name__
    return here and (inspect.isclass(value) or inspect.isfunction(value))


def _run_file(path: Path) -> ModuleType:
    """Runs a file as a module, which may import from its folder, as a script may."""
    if not path.is_file():
        if os.path.lexists(path):
            open_file(path)  # says what it is instead
        others = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = get_close_matches(str(path), others, n=1)
        raise ConfigError(f"there is no file {path}{f'; did you mean {near[0]}?' if near else ''}")
    name = f"own_file_{sha256(str(path.resolve()).encode() + read_bytes(path)).hexdigest()[:HEX_DIGITS]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # copies of its objects look their classes up
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        with no_exit():
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {one_line(error)[:200]}".removesuffix(": ")
        raise ConfigError(f"{path} cannot be run: {reason}") from error
    finally:
        sys.path.remove(folder)
    return module
