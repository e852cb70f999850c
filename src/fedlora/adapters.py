"""Reads and writes PEFT adapter directories, and finds target modules by their names.

Alpha, rsLoRA, `rank_pattern`, `alpha_pattern`, Conv1D layers and PEFT's key names are known here
and nowhere else; everything past this line sees `LowRank` updates with the scale folded into `B`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlora.errors import CheckpointError, InputError
from fedlora.lowrank import Delta, Deltas, Dense, LowRank

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_(A|B|E)(?:\.default)?(?:\.weight)?$")

_PLAIN = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "kasa_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
"""Keys of PEFT's configuration under which an adapter is a sum of products, and nothing else."""
_UNASKED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
"""Heads PEFT saves unasked, by task. It names all of them, and a model has one."""
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations whose factors are relative to base weights they changed."""


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """LoRA's scale `s`: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732)."""
    return alpha / (rank**0.5 if use_rslora else rank)


def fold(a: Tensor, b: Tensor, scale: float) -> LowRank:
    """LoRA's trained `A (r, n)`, `B (m, r)` as an update: `dW = s B A`. Copies, in float32."""
    return LowRank(a.detach().float().clone(), b.detach().float() * scale)


def unfold(x: LowRank, scale: float) -> tuple[Tensor, Tensor]:
    """An update as the `A`, `B` that LoRA trains under scale s: `B / s`. Copies."""
    return x.A.detach().clone(), x.B.detach() / scale


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Args:
        shapes: full module name -> `(m, n)` = (out features, in features).
        names: what PEFT's `target_modules` says to get exactly these.
        fan_in_fan_out: weights are stored `(n, m)` (GPT-2's Conv1D).
        model_name: of the base, for `base_model_name_or_path`.
        revision: of the base, for `revision`.
        task_type: PEFT's name of the task.
        modules_to_save: modules trained whole, as PEFT's `modules_to_save` names them.
        model_config: the model's own configuration as JSON, saved beside a classifier's adapter:
            it holds the label names.
    """

    shapes: dict[str, tuple[int, int]]
    names: list[str]
    fan_in_fan_out: bool
    model_name: str
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    modules_to_save: tuple[str, ...] = ()
    model_config: str | None = None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer whose weight is stored `(n, m)`."""
    return type(module).__name__ == "Conv1D"


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | str | None,
    model_name: str,
    revision: str | None = None,
    modules_to_save: Sequence[str] = (),
    task_type: str = "CAUSAL_LM",
) -> Targets:
    """Resolve `lora_target_modules` as PEFT does.

    Args:
        model: a transformers model without adapters.
        target_modules: names (a module's full name or the end of it), "all-linear" (all but the
            output head), a regular expression over full names, or None: PEFT's default for the
            architecture.
        model_name: of the base.
        revision: of the base.
        modules_to_save: modules trained whole (full names); they get no adapter.
        task_type: PEFT's name of the task.

    Raises:
        InputError: nothing matches; the message lists candidates.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    trained_whole = {n for n in linear if _inside(n, modules_to_save)}
    free = {n: m for n, m in linear.items() if n not in trained_whole}
    if target_modules is None:
        from peft.utils import constants

        kind = str(getattr(getattr(model, "config", None), "model_type", ""))
        known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if kind not in known:
            raise InputError(
                f"lora_target_modules: PEFT has no default for the architecture {kind!r}; give "
                f"module names, for example {_candidates(free)}, or all-linear"
            )
        target_modules = list(known[kind])
    if target_modules == "all-linear":
        chosen = {n: m for n, m in free.items() if m is not head}
    elif isinstance(target_modules, str):
        pattern, ends = target_modules, f".{target_modules}"
        try:
            chosen = {
                n: m
                for n, m in free.items()
                if n == pattern or n.endswith(ends) or re.fullmatch(pattern, n)
            }
        except re.error as error:
            raise InputError(
                f"lora_target_modules: {pattern!r} is no regular expression ({error}); expected "
                f"one over full names, or a name such as {_candidates(free)}"
            ) from None
    else:
        names = {w: {n for n in linear if n == w or n.endswith(f".{w}")} for w in target_modules}
        for wanted, found in names.items():
            if not found:
                raise InputError(
                    f"lora_target_modules: {wanted!r} "
                    + (_fused(model, wanted) or f"matches no linear layer of {model_name}")
                    + f"; it has {_candidates(free)}"
                )
            if found <= trained_whole:
                raise InputError(
                    f"lora_target_modules: {wanted!r} is trained whole (lora_modules_to_save, or a "
                    f"classifier's head) and takes no adapter; there are {_candidates(free)}"
                )
        chosen = {n: m for n, m in free.items() if any(n in found for found in names.values())}
    if not chosen:
        wanted = str(target_modules)
        raise InputError(
            f"lora_target_modules: {target_modules!r} "
            + (_fused(model, wanted) or f"matches no linear layer of {model_name}")
            + f"; it has {_candidates(free)}"
        )
    _refuse_bypassed(model, chosen)
    shapes = {}
    for name, module in chosen.items():
        rows, columns = module.weight.shape
        shapes[name] = (int(columns), int(rows)) if is_conv1d(module) else (int(rows), int(columns))
    ends_of = sorted({name.rpartition(".")[2] for name in chosen})
    # PEFT matches the ends of all modules' names, not of linear layers alone.
    matched = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in ends_of}
    return Targets(
        shapes=shapes,
        names=ends_of if matched == set(chosen) else sorted(chosen),
        fan_in_fan_out=any(is_conv1d(m) for m in chosen.values()),
        model_name=model_name,
        revision=revision,
        task_type=task_type,
        modules_to_save=tuple(modules_to_save),
    )


_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Architectures whose kernels read the weight of `out_proj` past any layer around it."""


def _refuse_bypassed(model: nn.Module, chosen: Mapping[str, Any]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", "")
    ends = {name.rpartition(".")[2] for name in chosen}
    if kind in _STATE_SPACE and "out_proj" in ends:
        raise InputError(
            f"lora_target_modules: {kind} reads the weight of out_proj past an adapter, and PEFT "
            f"loads none there; name others: {', '.join(sorted(ends - {'out_proj'}))}"
        )


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter is one of these modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Expert weights of a mixture of experts held as one tensor `(experts, ., .)`: name -> size."""
    return {
        name: value.numel()
        for name, value in model.named_parameters()
        if value.ndim == 3 and "expert" in name
    }


def _fused(model: nn.Module, wanted: str) -> str:
    """Why a name of fused expert weights cannot be a target; nothing where it is another name."""
    if any(f".{wanted}." in f".{name}." for name in fused_experts(model)):
        return (
            "names expert weights that are fused into one tensor for all experts, which is no "
            "linear layer; adapters go to the other layers"
        )
    return ""


def _candidates(linear: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def as_factors(x: Delta) -> LowRank:
    """What PEFT can hold: factors of rank at least 1, in float32.

    A dense update is its own factor beside an identity: as large as its singular factors would be,
    without their rounding.
    """
    m, n = x.shape
    if isinstance(x, Dense):
        w = x.W.float()
        x = LowRank(torch.eye(n), w) if n <= m else LowRank(w, torch.eye(m))
    if x.rank == 0:
        return LowRank(x.A.new_zeros(1, n).float(), x.B.new_zeros(m, 1).float())
    return LowRank(x.A.float().contiguous(), x.B.float().contiguous())


def write_adapter(
    path: Path, deltas: Deltas, targets: Targets, dense: Mapping[str, Tensor] | None = None
) -> None:
    """Write an update as a PEFT adapter directory, with `alpha = r`, hence scale 1, everywhere.

    `dense` holds the parameters of `modules_to_save` by their full names.

    Modules of `targets` that `deltas` does not name get a zero adapter of rank 1. The files are
    read back and compared before this returns. The same update gives the same bytes.

    Raises:
        CheckpointError: what was read back is not what was written.
        OSError: the files cannot be written.
    """
    from peft import LoraConfig

    factors = {}
    for name, (m, n) in targets.shapes.items():
        x = deltas.get(name)
        factors[name] = as_factors(
            x if x is not None else LowRank(torch.zeros(0, n), torch.zeros(m, 0))
        )
    ranks = {name: x.rank for name, x in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT matches the ends of names; ^ keeps a name that is another's end to itself.
    pattern = {
        f"^{name}" if any(other.endswith(f".{name}") for other in ranks) else name: rank
        for name, rank in ranks.items()
        if rank != common
    }
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(targets.names),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=targets.fan_in_fan_out,
        base_model_name_or_path=targets.model_name,
        revision=targets.revision,
        task_type=targets.task_type,
        modules_to_save=list(targets.modules_to_save) or None,
        inference_mode=True,
    ).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {}
    for name, x in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = x.A
        tensors[f"base_model.model.{name}.lora_B.weight"] = x.B
    for name, value in (dense or {}).items():
        tensors[f"base_model.model.{name}"] = value.detach().cpu().contiguous()
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    if targets.model_config is not None:
        (path / "config.json").write_text(targets.model_config)
    save_tensors(path / WEIGHTS_NAME, tensors)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, read it back and compare.

    Raises:
        CheckpointError: what was read back is not what was written.
        OSError: the file cannot be written (no space, no permission).
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors reports the system's error as text; give it back its number.
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found.group(1)) if found else 5, str(error), str(path)) from None
    back = load_file(path)
    same = back.keys() == tensors.keys() and all(
        torch.equal(back[k], t) for k, t in tensors.items()
    )
    if not same:
        raise CheckpointError(f"{path}: what was read back differs from what was written")


@dataclass(frozen=True)
class SavedAdapter:
    """What a PEFT LoRA directory holds.

    Args:
        deltas: target module -> its update, scale folded into `B`, in float32.
        dense: parameters of `modules_to_save`, by their full names.
        config: the contents of `adapter_config.json`.
    """

    deltas: dict[str, LowRank]
    dense: dict[str, Tensor]
    config: Mapping[str, Any]


def load_adapter(path: str | Path) -> SavedAdapter:
    """Read a PEFT LoRA directory.

    AdaLoRA's triplets `B diag(E) A` are read too, `E` folded into `A`.

    Args:
        path: a directory with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`,
            through a weights-only load).

    Raises:
        InputError: no such directory, not a plain LoRA adapter, or factors that do not fit.
    """
    from peft.utils.other import get_pattern_key

    path = Path(path)
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: holds no {CONFIG_NAME}; expected a PEFT directory") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path / CONFIG_NAME}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG_NAME}: holds no JSON object")
    adaptive = config.get("peft_type") == "ADALORA"
    for key, plain in _PLAIN.items():
        if config.get(key, plain) != plain and not (adaptive and key == "peft_type"):
            raise InputError(
                f"{path}: {key} is {config[key]!r}; only plain LoRA ({key} {plain!r}) is a sum of "
                "products that can be combined exactly"
            )
    if str(init := config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights too; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion to make it plain LoRA"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise InputError(
                f"{path / CONFIG_NAME}: {key} is {config.get(key)!r}; expected a number"
            )
    found: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    saved = [str(name) for name in config.get("modules_to_save") or []]
    unasked = _UNASKED.get(str(config.get("task_type")), ())
    saved += unasked
    for key, value in _weights(path).items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
        match = _KEY.match(key)
        plain_key = key.removeprefix("base_model.model.")
        if not match and plain_key != key and _saved_whole(plain_key, saved):
            dense[plain_key] = value
            continue
        if not match or value.ndim != 2:
            raise InputError(f"{path}: cannot use the tensor {key} {tuple(value.shape)}")
        found.setdefault(match.group(1), {})[match.group(2)] = value
    out = {}
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for name, pair in found.items():
        if adaptive:
            out[name] = _fold_adaptive(path, name, pair, config)
            continue
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InputError(f"{path}: the factors of {name} are incomplete or do not fit")
        rank = pair["A"].shape[0]
        said = ranks.get(get_pattern_key(list(ranks), name), config["r"])
        if said != rank:
            raise InputError(f"{path}: {name} has rank {rank}, its configuration says {said}")
        alpha: Any = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
        scale = scaling(alpha, rank, bool(config.get("use_rslora")))
        out[name] = fold(pair["A"], pair["B"], scale)
    if not out:
        raise InputError(f"{path}: holds no LoRA factors")
    absent = [m for m in config.get("modules_to_save") or [] if not holds(dense, str(m))]
    if any(holds(dense, m) for m in unasked):
        absent = [m for m in absent if m not in unasked]
    if absent:
        raise InputError(
            f"{path}: modules_to_save names {', '.join(map(str, absent))}, but there are no such "
            "weights in it; save the adapter again with them, or take the name out of "
            f"{CONFIG_NAME}"
        )
    return SavedAdapter(out, dense, config)


def _fold_adaptive(
    path: Path, name: str, parts: dict[str, Tensor], config: Mapping[str, Any]
) -> LowRank:
    """PEFT's AdaLoRA layer: `dW = s / (init_r + 1e-5) B diag(E) A`, with s = alpha."""
    if parts.keys() != {"A", "B", "E"} or not (
        len(parts["A"]) == len(parts["E"]) == parts["B"].shape[1]
    ):
        raise InputError(f"{path}: the factors of {name} are incomplete or do not fit")
    init = config.get("init_r", config["r"])
    alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else init
    return fold(parts["A"].float() * parts["E"].float(), parts["B"], alpha / (init + 1e-5))


def holds(dense: Mapping[str, Tensor], module: str) -> bool:
    """Whether there are parameters of one of PEFT's `modules_to_save`."""
    return any(_saved_whole(name, [module]) for name in dense)


def _saved_whole(parameter: str, modules: Sequence[str]) -> bool:
    """Whether a parameter lies in one of PEFT's `modules_to_save`: full names, or ends of them."""
    owner = f".{parameter.rpartition('.')[0]}."
    return any(f".{module}." in owner for module in modules)


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        if (path / WEIGHTS_NAME).exists():
            return dict(load_file(path / WEIGHTS_NAME))
        older = path / "adapter_model.bin"
        if older.exists():
            loaded: dict[str, Tensor] = torch.load(older, map_location="cpu", weights_only=True)
            return loaded
    except Exception as error:
        raise InputError(f"{path}: its weights cannot be read: {error}") from None
    raise InputError(f"{path}: holds no {WEIGHTS_NAME}")
