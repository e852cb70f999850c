"""Makes the paths of a configuration absolute, so that a resumed run finds them from anywhere."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.clients import with_overrides_read
from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.config.train_function import placed
from fedlora.data.templates import BUILT_IN_CHAT
from fedlora.embedded import EMBEDDED


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths, which a resumed run finds from any directory, and
    with the settings of single clients read from their files."""
    config = with_overrides_read(config)
    paths = {key: _absolute(getattr(config, key)) for key in keys_marked(Config, Mark.ABSOLUTE)}
    sockets = {name: str(Path(x).absolute()) for name, x in (config.sites or {}).items()}
    function = config.train_function and placed(config.train_function, Path.cwd())
    return config.model_copy(update={**paths, "sites": sockets or None, "train_function": function})


def _absolute(name: str | None) -> str | None:
    """An absolute path; a hub name stays as it is."""
    if name is None or name == EMBEDDED or name in BUILT_IN_CHAT:
        return name
    path = Path(name)
    pattern = bool(set(name) & set("*?["))
    exists = path.exists() or (
        path.parent.is_dir() and (pattern or (len(path.parts) > 1 and path.suffix))
    )
    return str(path.resolve()) if exists else name
