"""Loads the base model that a user brings, freezes it and wraps its target modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.checks import check_updates
from fedlora.model.fingerprint import weights_fingerprint
from fedlora.model.quantisation import (
    bits_of,
    note_on_saved_quantised,
    quantise,
    refuse_saved_quantised,
)
from fedlora.model.quantised_linear import require_bitsandbytes
from fedlora.model.sources import Source, in_one_line
from fedlora.model.targets import Targets, find_targets, fused_experts
from fedlora.model.torch_generator import borrowed_generator
from fedlora.seeds import SERVER, Purpose, integer
from fedlora.text import natural

if TYPE_CHECKING:
    from fedlora.config.config import Config


def load_model(
    source: Source,
    tokenizer: Any,
    config: Config,
    label_names: Sequence[str] = (),
    *,
    weights: bool = True,
) -> tuple[BaseModel, list[str]]:
    """Load the model, freeze it and wrap its target modules.

    A classifier gets a head for these labels; a new head is drawn from the run's seed.

    Args:
        source: where it comes from.
        tokenizer: the one its data is tokenised with.
        config: reads dtype, load_in_8bit, load_in_4bit, use_cpu, seed and the lora_ keys.
        label_names: a classifier's labels in the order of their ids; empty: a causal model.
        weights: False makes the modules without any memory, to look at their shapes.

    Returns:
        The model, and what the user should know.

    Raises:
        InputError: the model cannot be loaded, or a target module does not match.
    """
    bits = bits_of(config)
    if bits is not None:
        if weights:  # shapes alone need no library that packs them
            require_bitsandbytes(bits)
        refuse_saved_quantised(source.config, source.name, bits)
    # What is quantised is first loaded as the checkpoint holds it, see `quantisation`.
    dtype = config.dtype if bits is None else "auto"
    model, missing = load_pretrained(source, dtype, config.seed, label_names, weights=weights)
    _check_vocabulary(model, tokenizer, config.tokenizer_name or source.name)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    to_save = _modules_to_save(model, config.lora_modules_to_save, bool(label_names), missing)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    fingerprint = None
    if bits is not None:
        fingerprint = _original_fingerprint(model, to_save) if weights else None
        held = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        place = device if weights else torch.device("meta")
        quantise(model, source.name, bits, held, place, to_save)
    elif weights:
        model.to(device)
    targets = find_targets(
        model,
        config.lora_target_modules,
        source.name,
        source.revision,
        to_save,
        "SEQ_CLS" if label_names else "CAUSAL_LM",
    )
    if label_names:
        model.config.architectures = [type(model).__name__]
        targets = dataclasses.replace(targets, model_config=model.config.to_json_string())
    else:
        model.generation_config = greedy(model)
    notes = [*note_on_saved_quantised(source.config, source.name), *_notes(model, targets, missing)]
    base = attach(model, tokenizer, targets, fingerprint)
    if weights:
        check_updates(base)
    return base, notes


def _original_fingerprint(model: Any, to_save: Sequence[str]) -> str:
    """The fingerprint of a model as its checkpoint holds it, without what is trained whole."""
    whole = {
        f"{name}.{end}"
        for name in to_save
        for end, _ in model.get_submodule(name).named_parameters()
    }
    return weights_fingerprint(model, skip=whole)


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Every token of the tokenizer has to have an embedding in the model."""
    embeddings = model.get_input_embeddings()
    if embeddings is not None and len(tokenizer) > embeddings.num_embeddings:
        raise InputError(
            f"tokenizer_name: {name} has {len(tokenizer)} tokens, "
            f"the model {embeddings.num_embeddings}; they do not belong together"
        )


def load_pretrained(
    source: Source, dtype: str, seed: int, label_names: Sequence[str], *, weights: bool = True
) -> tuple[Any, list[str]]:
    """The model of transformers in the configured dtype, on no device yet.

    Args:
        source: where it comes from.
        dtype: of the weights, as the configuration names it; auto: the checkpoint's own.
        seed: of a classifier's new head.
        label_names: a classifier's; empty for a language model.
        weights: False makes the model of shapes alone.

    Returns:
        The model, and the names of weights that the checkpoint lacks.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if label_names else AutoModelForCausalLM
    own = source.config
    before = source.labels
    if label_names:
        own.num_labels = len(label_names)
        own.id2label = dict(enumerate(label_names))
        own.label2id = {name: i for i, name in enumerate(label_names)}
        own.problem_type = "single_label_classification"
    elif _reads_both_ways(own):
        raise InputError(
            f"model_name_or_path: {source.name} ({own.model_type}) reads text in both directions "
            "and cannot write any; to train it as a classifier give label_column_name"
        )
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    with (
        in_one_line(f"model_name_or_path: {source.name}: the model cannot be loaded"),
        # A head that the checkpoint lacks is drawn from torch's one generator of the process.
        borrowed_generator([], integer(seed, 0, SERVER, Purpose.HEAD)),
    ):
        if not weights:
            with torch.device("meta"):
                model = kind.from_config(
                    own,
                    dtype=None if dtype == "auto" else torch_dtype,
                    trust_remote_code=source.trust_remote_code,
                )
            return model, []
        model, info = kind.from_pretrained(
            source.name,
            config=own,
            dtype=torch_dtype,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            ignore_mismatched_sizes=bool(label_names),
            output_loading_info=True,
        )
        changed = [entry[0] for entry in info.get("mismatched_keys", [])]
        if source.classifier and len(before) == len(label_names) and before != tuple(label_names):
            _follow_labels(model, before, label_names)
    return model, sorted({*info["missing_keys"], *changed})


@torch.no_grad()
def _follow_labels(model: Any, before: Sequence[str], now: Sequence[str]) -> None:
    """A head of as many labels: its rows in their new order, or drawn anew for other labels."""
    layers = [
        module
        for name, child in model.named_children()
        if name != model.base_model_prefix
        for module in child.modules()
        if isinstance(module, nn.Linear) and module.out_features == len(now)
    ]
    for value in layers[-1].parameters() if layers else ():
        if set(before) == set(now):
            value.copy_(value[[before.index(name) for name in now]].clone())
        elif value.ndim > 1:
            value.normal_(std=getattr(model.config.get_text_config(), "initializer_range", 0.02))
        else:
            value.zero_()


def _reads_both_ways(config: Any) -> bool:
    """Whether this is an encoder, of which transformers would make a decoder that knows nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = getattr(config, "model_type", "")
    if kind not in CAUSAL:  # unless code that comes with the model can write
        return kind in MASKED and "AutoModelForCausalLM" not in (
            getattr(config, "auto_map", None) or {}
        )
    return kind in MASKED and not getattr(config, "is_decoder", False)


def _modules_to_save(
    model: Any, wanted: Sequence[str] | None, classifier: bool, missing: Sequence[str]
) -> list[str]:
    """Full names of the modules trained whole: those wanted, a classifier's head, new ones."""
    names = _head_modules(model, missing) if classifier else set[str]()
    for end in wanted or []:
        names |= _named_modules(model, end)
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    outer.sort(key=natural)
    _refuse_shared(model, outer)
    return outer


def _head_modules(model: Any, missing: Sequence[str]) -> set[str]:
    """What stands beside a classifier's trunk, and what its checkpoint has no weights for."""
    beside = {
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and _has_parameters(module)
    }
    return beside | {parameter.rpartition(".")[0] for parameter in missing}


def _named_modules(model: nn.Module, end: str) -> set[str]:
    """The modules of this name or end of a name, at least one of them with parameters."""
    named = {n: m for n, m in model.named_modules() if n == end or n.endswith(f".{end}")}
    if not any(_has_parameters(module) for module in named.values()):
        tops = ", ".join(name for name, _ in model.named_children())
        raise InputError(
            f"lora_modules_to_save: {end!r} is no module of this model with parameters; at "
            f"its top it has {tops}"
        )
    return set(named)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _refuse_shared(model: nn.Module, modules: Sequence[str]) -> None:
    """Refuse modules trained whole that share a tensor with the rest of the model."""
    inside = {
        id(p): f"{name}.{end}"
        for name in modules
        for end, p in model.get_submodule(name).named_parameters()
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trained = inside.get(id(parameter))
        if trained and not any(name.startswith(f"{module}.") for module in modules):
            raise InputError(
                f"lora_modules_to_save: {trained} is the same tensor as {name} (tied weights); "
                "training one would change the other, and a saved adapter could not say so"
            )


def _notes(model: Any, targets: Targets, missing: Sequence[str]) -> list[str]:
    """What the user should know: experts and layers without an adapter, weights drawn anew."""
    return [
        *_note_on_experts(model),
        *_notes_on_left_out(targets),
        *_note_on_new_weights(targets, missing),
    ]


def _note_on_experts(model: Any) -> list[str]:
    experts = fused_experts(model)
    if not experts:
        return []
    total = sum(p.numel() for p in model.parameters())
    return [
        f"mixture of experts: {sum(experts.values()) / total:.0%} of the parameters are fused "
        "expert weights, which get no adapter; attention and the other linear layers do"
    ]


def _notes_on_left_out(targets: Targets) -> list[str]:
    """One line for every reason, with the first layer that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, why in targets.left_out.items():
        by_reason.setdefault(why, []).append(name)
    return [
        f"lora_target_modules: all-linear leaves out {names[0]}"
        + (f" and {len(names) - 1} more like it" if len(names) > 1 else "")
        + f": it {why}, so it can carry no adapter"
        for why, names in by_reason.items()
    ]


def _note_on_new_weights(targets: Targets, missing: Sequence[str]) -> list[str]:
    """Weights that the checkpoint lacks and that are not trained."""
    trained = tuple(f"{module}." for module in targets.modules_to_save)
    new = [name for name in missing if not name.startswith(trained)]
    if not new:
        return []
    some = ", ".join(new[:3]) + (" ..." if len(new) > 3 else "")
    return [f"{len(new)} weights are not in the checkpoint and stay as they were drawn: {some}"]


def greedy(model: Any) -> Any:
    """The model's special tokens alone: its sampling and penalties would be inherited."""
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(own, name, None) for name in names})
