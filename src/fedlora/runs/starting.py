"""Reads what a run starts from where `init_adapter` names a PEFT directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from fedlora.adapters.bases import base_name, same_name
from fedlora.adapters.contents import same_weights
from fedlora.adapters.labels import label_names
from fedlora.adapters.peft_files import read_adapter_config
from fedlora.adapters.renaming import renamer
from fedlora.adapters.saved_adapter import SavedAdapter, load_adapter
from fedlora.config.config import Config
from fedlora.embedded import BASE_DIR, EMBEDDED
from fedlora.errors import InputError
from fedlora.lowrank import LowRank


def from_adapter(
    source: str,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    dense: Mapping[str, Tensor],
    names: Sequence[str],
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """The update and the parameters trained whole that a run goes on from.

    Args:
        source: the directory.
        model: the base with adapter layers; modules are named as PEFT would name them for it.
        shapes: target module -> `(m, n)`.
        dense: parameters trained whole, as the base has them.
        names: a classifier's labels in the order of their ids.

    Raises:
        InputError: it cannot be read, changes what is not trained, or belongs to other weights or
            labels.
    """
    try:
        saved = load_adapter(source)
        theirs = label_names(saved.model_config) if names else None
    except InputError as error:
        raise InputError(f"init_adapter: {error}") from None
    rename = renamer(model, [*shapes, *dense])
    deltas = {rename(name): x for name, x in saved.deltas.items()}
    for name, x in deltas.items():
        if shapes.get(name) != x.shape:
            raise InputError(
                f"init_adapter: {source} changes {name} {x.shape}, which is not among the target "
                f"modules ({shapes.get(name, 'absent')})"
            )
    if theirs and theirs != tuple(names):
        raise InputError(
            f"init_adapter: {source} was trained with the labels {', '.join(theirs)}, in this "
            f"order; this run has {', '.join(names)}: see label_names"
        )
    _same_weights(saved, rename, model)
    out = dict(dense)
    for name, value in ((rename(name), value) for name, value in saved.dense.items()):
        if name not in out or out[name].shape != value.shape:
            shape = tuple(out[name].shape) if name in out else "absent"
            raise InputError(
                f"init_adapter: {source} holds {name} {tuple(value.shape)}, which is not among "
                f"what is trained whole ({shape}); see lora_modules_to_save"
            )
        out[name] = value.to(out[name].dtype)
    return deltas, out


def _same_weights(saved: SavedAdapter, rename: Callable[[str], str], model: nn.Module) -> None:
    """Refuse an adapter that brings weights of another base, such as resized embeddings.

    Raises:
        InputError: which.
    """
    parameters = {
        name.replace(".base.", "."): p for name, p in model.named_parameters(remove_duplicate=False)
    }
    for name, value in saved.base.items():
        parameter = parameters.get(rename(name))
        if parameter is not None and parameter.is_meta:
            raise InputError(
                f"init_adapter: {saved.source} brings the base's weight {name}, which the server "
                "cannot compare without the base; give it eval_file and server_evaluation: true"
            )
        if parameter is None or not same_weights(parameter.detach().cpu(), value):
            shape = "absent" if parameter is None else tuple(parameter.shape)
            raise InputError(
                f"init_adapter: {saved.source} brings the base's weight {name} "
                f"{tuple(value.shape)}, which is another one here ({shape}); where a vocabulary "
                "was resized, save the resized model and give it as model_name_or_path"
            )


def init_notes(config: Config) -> list[str]:
    """What to say about a directory that names another base than the run's."""
    if not config.init_adapter:
        return []
    try:
        theirs = base_name(read_adapter_config(Path(config.init_adapter)))
    except InputError:
        return []  # `from_adapter` reports it
    embedded = config.model_name_or_path == EMBEDDED
    own = str(BASE_DIR) if embedded else config.model_name_or_path
    ours = base_name({"base_model_name_or_path": own})
    if same_name(theirs, ours) or Path(theirs).name == Path(ours).name:
        return []
    return [
        f"init_adapter: {config.init_adapter} names the base {theirs}, this run {ours}; their "
        "shapes are compared, and whether they are one model is not written in it"
    ]
