"""Imports the local training that a configuration names as `module:function`.

Importing a module runs it. So only whoever starts a process may name one: a run's own user, and a
site in its own file. A server cannot set the key for its sites.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlora.errors import InputError

TrainFunction = Callable[..., Mapping[str, Any]]
"""`(model, dataset, training) -> metrics`, as `fedlora.client.local_training` has it."""

EXPECTED = "expected module:function, such as my_training:sft, or my_training.py:sft"


def is_name(name: str) -> bool:
    """Whether this has the form `module:function` or `FILE.py:function`."""
    module, _, function = name.rpartition(":")
    return function.isidentifier() and bool(
        module.endswith(".py") or re.fullmatch(r"\w+(\.\w+)*", module)
    )


def placed(name: str, directory: Path) -> str:
    """The name, with the absolute path of its file where that lies in this directory.

    `sft:train` and `sft.py:train` become `/directory/sft.py:train` where there is a `sft.py`. All
    others are left as they are, and looked for among the modules of Python.
    """
    module, _, function = name.rpartition(":")
    path = directory / (module if module.endswith(".py") else f"{module}.py")
    return f"{path.resolve()}:{function}" if path.is_file() else name


def load_train_function(name: str) -> TrainFunction:
    """The function of this name.

    The directory of a file is added to the end of `sys.path`, so that the module can import those
    beside it, and worker processes can import the module.

    Args:
        name: `module:function` or `FILE.py:function`; relative files count from the current
            directory.

    Raises:
        InputError: there is no such module or function, or the module cannot be imported.
    """
    module, _, function = placed(name, Path.cwd()).rpartition(":")
    try:
        found = getattr(_imported(name, module), function, None)
    except InputError:
        raise
    except Exception as error:  # whatever the module does when it is imported
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"train_function: {name}: cannot be imported: {why}") from error
    if not callable(found):
        raise InputError(f"train_function: {name}: the module has no function {function}")
    training: TrainFunction = found
    return training


def _imported(name: str, module: str) -> Any:
    if not module.endswith(".py"):
        return import_module(module)
    path = Path(module)
    if not path.is_file():
        raise InputError(f"train_function: {name}: there is no file {path}")
    directory = str(path.parent.resolve())
    if directory not in sys.path:
        sys.path.append(directory)
    imported = import_module(path.stem)
    origin = getattr(imported, "__file__", None)
    if origin is None or Path(origin).resolve() != path.resolve():
        raise InputError(
            f"train_function: {name}: another module is called {path.stem} already "
            f"({origin or 'a part of Python'}); rename the file"
        )
    return imported
