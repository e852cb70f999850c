"""The base model: loaded once, frozen, and wrapped so that adapters come and go.

Every target module is wrapped in an `AdapterLayer` once. A client's turn loads what lies frozen
beside its adapter and the adapter itself into the layers; the base weights are never written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapters import Targets, find_targets, fold, is_conv1d, unfold
from fedlora.errors import InputError
from fedlora.lowrank import Adapter, Delta, Deltas, LowRank, add, to_dense


class AdapterLayer(nn.Module):
    """`y = W_0 x + frozen x + s B A dropout(x)` over a linear layer or a Conv1D.

    The frozen side is added to a copy of a float32 weight, always from the pristine base, so that
    nothing drifts. Beside a weight of lower precision, where adding would round small updates
    away, it is computed as a branch of its own.

    Args:
        base: the layer to wrap; its weight is left as it is.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.conv1d = is_conv1d(base)
        self.A: nn.Parameter | None = None  # (r, n)
        self.B: nn.Parameter | None = None  # (m, r)
        self.scale = 1.0
        self.dropout = 0.0
        self.start: tuple[Tensor, Tensor] | None = None  # B at the start, with and without scale
        self.merged: Tensor | None = None  # (m, n), or (n, m) for Conv1D
        self.branch: Delta | None = None

    @property
    def weight(self) -> Tensor:
        """The pristine base weight; some architectures ask a layer for its dtype this way."""
        return cast(Tensor, self.base.weight)

    def load(
        self, frozen: Sequence[Delta], adapter: LowRank | None, scale: float, dropout: float
    ) -> None:
        """Take a client's frozen updates and its trainable adapter (None: nothing to train)."""
        weight = self.weight
        self.merged = self.branch = self.A = self.B = self.start = None
        self.scale, self.dropout = scale, dropout
        if frozen:
            device = weight.device
            total = add([_move(x, device) for x in frozen])
            if weight.dtype in (torch.float32, torch.float64):
                dense = to_dense(total).to(weight.dtype)
                self.merged = weight.detach() + (dense.T if self.conv1d else dense)
            else:
                self.branch = total
        if adapter is not None:
            a, b = unfold(adapter, scale)
            self.start = adapter.B, b.clone()
            self.A = nn.Parameter(a.to(weight.device))
            self.B = nn.Parameter(b.to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., n)` -> `(..., m)`."""
        if self.merged is None:
            y = cast(Tensor, self.base(x))
        elif self.conv1d:
            y = torch.addmm(
                cast(Tensor, self.base.bias), x.reshape(-1, x.shape[-1]), self.merged
            ).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.merged, cast("Tensor | None", self.base.bias))
        if isinstance(self.branch, LowRank):
            side = F.linear(F.linear(x.float(), self.branch.A), self.branch.B)
            y = y + side.to(y.dtype)
        elif self.branch is not None:
            y = y + F.linear(x.float(), self.branch.W).to(y.dtype)
        if self.A is not None and self.B is not None:
            into = F.dropout(x, self.dropout, self.training) if self.dropout else x
            low = F.linear(into.to(self.A.dtype), self.A)  # (..., r)
            if y.dtype == self.B.dtype:
                flat = low.reshape(-1, low.shape[-1])
                y = torch.addmm(y.reshape(-1, y.shape[-1]), flat, self.B.T, alpha=self.scale).view(
                    y.shape
                )
            else:
                y = y + (self.scale * F.linear(low, self.B)).to(y.dtype)
        return y


def _move(x: Delta, device: torch.device) -> Delta:
    if isinstance(x, LowRank):
        return LowRank(x.A.to(device), x.B.to(device))
    return type(x)(x.W.to(device))


@dataclass(frozen=True)
class BaseModel:
    """A frozen base with adapter layers in place.

    Args:
        model: the transformers model; only adapter factors require gradients.
        tokenizer: its tokenizer, with a padding token.
        targets: where the adapters go.
        layers: target module name -> its layer.
        fingerprint: of the base weights, to recognise another base on resume.
    """

    model: Any
    tokenizer: Any
    targets: Targets
    layers: Mapping[str, AdapterLayer]
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return cast(torch.device, next(self.model.parameters()).device)

    def load(
        self,
        frozen: Sequence[Deltas],
        adapter: Adapter | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        """Set all layers: `W_0 + sum frozen`, and what is trained on top."""
        for name, layer in self.layers.items():
            parts = [deltas[name] for deltas in frozen if name in deltas]
            layer.load(parts, adapter[name] if adapter is not None else None, scale, dropout)

    def read_adapter(self) -> dict[str, LowRank]:
        """The adapter as it now is, scale folded, in float32, on the CPU.

        `B` is its start plus the scaled change, so that what was not trained comes back to the bit:
        dividing by a scale and multiplying again would count as learning.

        Raises:
            ValueError: no adapter is loaded.
        """
        out = {}
        for name, layer in self.layers.items():
            if layer.A is None or layer.B is None or layer.start is None:
                raise ValueError(f"{name} holds no adapter")
            folded, plain = layer.start
            learnt = fold(layer.A.cpu(), layer.B.cpu() - plain, layer.scale)
            out[name] = LowRank(learnt.A, folded + learnt.B)
        return out


def attach(model: Any, tokenizer: Any, targets: Targets) -> BaseModel:
    """Freeze a model and wrap its target modules. The model is changed in place."""
    model.requires_grad_(False)
    fingerprint = weights_fingerprint(model)
    layers = {}
    for name in targets.shapes:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        layers[name] = AdapterLayer(getattr(owner, child))
        setattr(owner, child, layers[name])
    return BaseModel(model, tokenizer, targets, layers, fingerprint)


def weights_fingerprint(model: nn.Module) -> str:
    """A SHA-256 over names, shapes and at most 4,096 evenly spaced values of every parameter."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_base(
    name: str,
    *,
    target_modules: Sequence[str] | str | None,
    dtype: str = "float32",
    tokenizer_name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_cpu: bool = False,
) -> BaseModel:
    """Load a causal language model and its tokenizer, freeze it and wrap its target modules.

    Args:
        name: hub name or directory, as `from_pretrained` takes it.
        target_modules: see `find_targets`.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's.
        tokenizer_name: another tokenizer than the model's own.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        use_cpu: stay on the CPU where there is a GPU.

    Raises:
        InputError: the model or the tokenizer cannot be loaded, or no target module matches.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind, **common)
    except Exception as error:
        raise InputError(
            f"model_name_or_path: {name}: the model cannot be loaded: {_short(error)}"
        ) from None
    source = tokenizer_name or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except Exception as error:
        key = "tokenizer_name" if tokenizer_name else "model_name_or_path"
        raise InputError(
            f"{key}: {source}: the tokenizer cannot be loaded: {_short(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise InputError(
            f"tokenizer_name: {source} has {len(tokenizer)} tokens, the model "
            f"{model.get_input_embeddings().num_embeddings}; they do not belong together"
        )
    if torch.cuda.is_available() and not use_cpu:
        model.to("cuda")
    model.config.use_cache = False
    model.generation_config = _greedy(model)
    return attach(model, tokenizer, find_targets(model, target_modules, name, revision))


def _greedy(model: Any) -> Any:
    """The model's special tokens alone: its sampling and penalties would be inherited."""
    from transformers import GenerationConfig

    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(own, name, None) for name in names})


def _short(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
