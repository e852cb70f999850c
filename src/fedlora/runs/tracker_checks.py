"""Checks that the trackers of `report_to` exist, are installed and can be logged into."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from fedlora.config.config import Config
from fedlora.config.keys import TRACKERS
from fedlora.errors import InputError
from fedlora.text import first_line, nearest


def check_trackers(config: Config) -> list[str]:
    """The names of the trackers that `report_to` asks for.

    Raises:
        InputError: an unknown name, a library that is not installed, or nobody logged in.
    """
    wanted = config.report_to
    if wanted is None or wanted in ("none", ["none"], []):
        return []
    if wanted in ("all", ["all"]):
        names = [name for name in TRACKERS if _installed(name)]
    else:
        names = list(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    for name in names:
        if name not in TRACKERS:
            among = ", ".join(TRACKERS)
            hint = nearest(name, [*TRACKERS, "none", "all"], "")
            raise InputError(f"report_to: {name!r} is none of {among}; or none, or all{hint}")
        if not _installed(name):
            raise InputError(f"report_to: {name} is not installed; pip install 'fedlora[trackers]'")
        try:
            import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except Exception as error:  # whatever a broken installation raises
            raise InputError(
                f"report_to: {name} cannot be imported: {first_line(error)}; "
                "pip install 'fedlora[trackers]'"
            ) from None
    if "wandb" in names:
        _check_login()
    return names


def _installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # wandb's own output is a directory `wandb`


def _check_login() -> None:
    """Refuse wandb without a login: it would ask for a key, or fail, in the middle of a run."""
    wandb = import_module("wandb")
    if wandb.run is not None:
        return
    remedy = "`wandb login`, or set WANDB_MODE=offline, or leave wandb out of report_to"
    try:
        online = wandb.setup().settings.mode in ("online", "run", "shared")
        known = not online or wandb.login(prompt=False)
    except Exception as error:
        raise InputError(f"report_to: wandb: {first_line(error)}; {remedy}") from None
    if not known:
        raise InputError(f"report_to: wandb: nobody is logged in; {remedy}")
