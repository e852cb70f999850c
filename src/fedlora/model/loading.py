"""Loads the configuration, the tokenizer and the model that a Hugging Face user brings."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlora.data.templates import BUILT_IN_CHAT
from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.checks import check_updates
from fedlora.model.targets import Targets, find_targets, fused_experts
from fedlora.seeds import SERVER, Purpose, integer
from fedlora.text import natural

if TYPE_CHECKING:
    from fedlora.config.config import Config


@dataclass(frozen=True)
class Source:
    """Where a base model comes from.

    Args:
        name: hub name or directory, as `from_pretrained` takes it.
        config: its configuration, of transformers.
        classifier: whether the checkpoint is a sequence classifier already.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
    """

    name: str
    config: Any
    classifier: bool
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a classifier's checkpoint by id; transformers' `LABEL_7` counts as 7."""
        own = sorted((int(i), str(name)) for i, name in (self.config.id2label or {}).items())
        return tuple(str(i) if name == f"LABEL_{i}" else name for i, name in own)


def find_source(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Read a model's configuration, and none of its weights.

    Raises:
        InputError: there is no such model, or its architecture is unknown.
    """
    from transformers import AutoConfig

    check_place("model_name_or_path", name)
    with _explained(f"model_name_or_path: {name}: the model cannot be loaded", name):
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    kinds = getattr(config, "architectures", None) or []
    classifier = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    return Source(name, config, classifier, revision, trust_remote_code)


def load_tokenizer(
    source: Source,
    name: str | None = None,
    chat_template: str | None = None,
    generates: bool = True,
) -> Any:
    """The model's tokenizer, or another, with a padding token.

    Args:
        source: the model.
        name: another tokenizer than the model's own.
        chat_template: a Jinja file, a tokenizer (hub name or directory) that has one, or a name of
            `BUILT_IN_CHAT`.
        generates: the model writes text, so there has to be an end-of-text token.

    Raises:
        InputError: a tokenizer cannot be loaded, has no chat template or no end-of-text token.
    """
    from transformers import AutoTokenizer

    def load(key: str, which: str, revision: str | None) -> Any:
        check_place(key, which)
        with _explained(f"{key}: {which}: the tokenizer cannot be loaded", which):
            return AutoTokenizer.from_pretrained(
                which, revision=revision, trust_remote_code=source.trust_remote_code
            )

    key = "tokenizer_name" if name else "model_name_or_path"
    tokenizer = load(key, name or source.name, None if name else source.revision)
    where = name or source.name
    if tokenizer.eos_token_id is None and generates:
        raise InputError(f"{where}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"{where}: the tokenizer has no padding token (pad_token)")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template:
        path = BUILT_IN_CHAT.get(chat_template, Path(chat_template))
        if path.is_file():
            try:
                tokenizer.chat_template = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"chat_template_path: {path}: cannot be read: {error}") from None
        else:
            other = load("chat_template_path", chat_template, None)
            if not getattr(other, "chat_template", None):
                raise InputError(f"chat_template_path: {chat_template} has no chat template")
            tokenizer.chat_template = other.chat_template
    return tokenizer


def label_order(source: Source, names: Sequence[str]) -> tuple[str, ...]:
    """The labels in the order of their ids: the checkpoint's where it has just these labels."""
    if source.classifier and sorted(source.labels) == sorted(names):
        return source.labels
    return tuple(names)


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
        config: reads dtype, use_cpu, seed and the lora_ keys.
        label_names: a classifier's labels in the order of their ids; empty: a causal model.
        weights: False makes the modules without any memory, to look at their shapes.

    Returns:
        The model, and what the user should know.

    Raises:
        InputError: the model cannot be loaded, or a target module does not match.
    """
    model, missing = load_pretrained(source, config, label_names, weights)
    embeddings = model.get_input_embeddings()
    if embeddings is not None and len(tokenizer) > embeddings.num_embeddings:
        raise InputError(
            f"tokenizer_name: {config.tokenizer_name or source.name} has {len(tokenizer)} tokens, "
            f"the model {embeddings.num_embeddings}; they do not belong together"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    if weights and torch.cuda.is_available() and not config.use_cpu:
        model.to("cuda")
    to_save = _modules_to_save(model, config.lora_modules_to_save, bool(label_names), missing)
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
    notes = _notes(model, targets, missing)
    base = attach(model, tokenizer, targets)
    if weights:
        check_updates(base)
    return base, notes


def load_pretrained(
    source: Source, config: Config, label_names: Sequence[str], weights: bool
) -> tuple[Any, list[str]]:
    """The model of transformers in the configured dtype, on no device yet.

    Args:
        source: where it comes from.
        config: dtype, revision and trust.
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
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with (
        _explained(f"model_name_or_path: {source.name}: the model cannot be loaded"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(integer(config.seed, 0, SERVER, Purpose.HEAD))
        if not weights:
            with torch.device("meta"):
                plain = None if dtype == "auto" else dtype
                model = kind.from_config(
                    own, dtype=plain, trust_remote_code=source.trust_remote_code
                )
            return model, []
        model, info = kind.from_pretrained(
            source.name,
            config=own,
            dtype=dtype,
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
    model: Any, asked: Sequence[str] | None, classifier: bool, missing: Sequence[str]
) -> list[str]:
    """Full names of the modules trained whole: those asked for, a classifier's head, new ones."""
    chosen: dict[str, None] = {}
    if classifier:
        for name, module in model.named_children():
            if name != model.base_model_prefix and any(True for _ in module.parameters()):
                chosen[name] = None
        for parameter in missing:
            chosen[parameter.rpartition(".")[0]] = None
    modules = dict(model.named_modules())
    for wanted in asked or []:
        found = [n for n in modules if n == wanted or n.endswith(f".{wanted}")]
        if not found or not any(True for n in found for _ in modules[n].parameters()):
            tops = ", ".join(name for name, _ in model.named_children())
            raise InputError(
                f"lora_modules_to_save: {wanted!r} is no module of this model with parameters; at "
                f"its top it has {tops}"
            )
        chosen.update(dict.fromkeys(found))
    names = sorted(chosen, key=natural)
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    _refuse_shared(model, outer)
    return outer


def _refuse_shared(model: nn.Module, modules: Sequence[str]) -> None:
    inside = {
        id(p): f"{name}.{end}"
        for name in modules
        for end, p in model.get_submodule(name).named_parameters()
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        theirs = inside.get(id(parameter))
        if theirs and not any(name.startswith(f"{module}.") for module in modules):
            raise InputError(
                f"lora_modules_to_save: {theirs} is the same tensor as {name} (tied weights); "
                "training one would change the other, and a saved adapter could not say so"
            )


def _notes(model: Any, targets: Targets, missing: Sequence[str]) -> list[str]:
    out = []
    experts = fused_experts(model)
    if experts:
        total = sum(p.numel() for p in model.parameters())
        out.append(
            f"mixture of experts: {sum(experts.values()) / total:.0%} of the parameters are fused "
            "expert weights, which get no adapter; attention and the other linear layers do"
        )
    for why in dict.fromkeys(targets.left_out.values()):
        names = [name for name, other in targets.left_out.items() if other == why]
        out.append(
            f"lora_target_modules: all-linear leaves out {names[0]}"
            + (f" and {len(names) - 1} more like it" if len(names) > 1 else "")
            + f": it {why}, so it can carry no adapter"
        )
    new = [name for name in missing if name.rpartition(".")[0] not in targets.modules_to_save]
    new = [n for n in new if not any(n.startswith(f"{m}.") for m in targets.modules_to_save)]
    if new:
        out.append(
            f"{len(new)} weights are not in the checkpoint and stay as they were drawn: "
            + ", ".join(new[:3])
            + (" ..." if len(new) > 3 else "")
        )
    return out


def greedy(model: Any) -> Any:
    """The model's special tokens alone: its sampling and penalties would be inherited."""
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(own, name, None) for name in names})


def check_place(key: str, name: str, holds: str | None = None) -> None:
    """Refuse what can only be a path and is no directory, and so is no name on the hub.

    Args:
        key: of the configuration.
        name: its value.
        holds: the file it must hold, where it is a directory and never a name on the hub.

    Raises:
        InputError: that there is no such directory, and what is near.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        if key == "chat_template_path":
            return
        raise InputError(f"{key}: {name} is a file; give the directory that it lies in")
    if holds is None and re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name, re.ASCII):
        return
    lacks = f"holds no {holds}: " if holds else ""
    raise InputError(f"{key}: {name}: {lacks}there is no such directory{_near(path)}")


def _near(path: Path) -> str:
    """What there is in the place of a path that does not exist."""
    if str(path).startswith("~") and path.expanduser().exists():
        return f"; ~ stands for your home in a shell alone: give {path.expanduser()}"
    inside = next((p for p in path.parents if p.is_dir()), Path())
    missing = path.relative_to(inside).parts if path.is_relative_to(inside) else path.parts
    try:
        there = sorted(p.name for p in inside.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError:
        there = []
    close = difflib.get_close_matches(missing[0] if missing else "", there, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {inside / close[0]}?"
    some = ", ".join(there[:5]) + (" ..." if len(there) > 5 else "")
    return f"; {inside.absolute()} has {some or 'no directories'}"


@contextmanager
def _explained(what: str, name: str | None = None) -> Iterator[None]:
    """Whatever a library raises in here becomes one line for the user.

    Args:
        what: the beginning of the line.
        name: on the hub or a directory; where it is none, the line says so.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where = ""
        if name is not None and not Path(name).exists():
            where = f" (there is no directory {name} either{_near(Path(name))})"
        raise InputError(f"{what}: {_short(error)}{where}") from None


def _short(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
