"""Tells how llama.cpp names and lays out the weights of a model of transformers.

Names come from the `gguf` package's own table. llama.cpp rotates neighbouring numbers of a head
where transformers rotates its two halves, so that for llama's architecture the rows of q_proj and
k_proj are interleaved, head by head:

    rows 0 .. h-1 of a head   ->   0, h/2, 1, h/2 + 1, ...

and the rows of an adapter's B with them. Qwen2's and Qwen3's stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from fedlora.errors import InputError

_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
"""transformers' model type -> llama.cpp's architecture, and whether it interleaves rows."""
_IN_A_LAYER = (
    *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
)
_CONVERTER = (
    "llama.cpp's own converter knows more: give it what --format merged writes "
    "(convert_hf_to_gguf.py), or --format peft --for llama.cpp (convert_lora_to_gguf.py)"
)
"""The way round."""


def gguf_package() -> ModuleType:
    """The `gguf` package, which is an extra of fedlora's.

    Raises:
        InputError: it is not installed, and how to install it.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the gguf package: pip install 'fedlora[gguf]'") from None
    package: ModuleType = gguf
    return package


@dataclass(frozen=True)
class Layout:
    """Where llama.cpp has the weights of one model.

    Args:
        architecture: llama.cpp's name of it.
        layers: of the model.
        heads: of q_proj.
        kv_heads: of k_proj.
        interleaves: whether rows of q_proj and k_proj are interleaved.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    interleaves: bool

    def names(self) -> dict[str, str]:
        """transformers' name of a module -> llama.cpp's."""
        gguf = gguf_package()
        kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(kinds[self.architecture], self.layers)
        modules = ["model.embed_tokens", "model.norm", "lm_head"]
        modules += [f"model.layers.{i}.{end}" for i in range(self.layers) for end in _IN_A_LAYER]
        found = {module: table.get_name(module) for module in modules}
        return {module: name for module, name in found.items() if name is not None}

    def interleaved(self, module: str, x: Tensor) -> Tensor:
        """The rows `(m, ...)` of a module's weight, bias or B as llama.cpp has them."""
        heads = self._heads(module)
        if heads is None:
            return x
        return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def separated(self, module: str, x: Tensor) -> Tensor:
        """The inverse of `interleaved`."""
        heads = self._heads(module)
        if heads is None:
            return x
        return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def _heads(self, module: str) -> int | None:
        """Heads of a module whose rows are interleaved; None where they are not."""
        if not self.interleaves:
            return None
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(module.rpartition(".")[2])


def layout_of(config: Any) -> Layout:
    """The layout of a model.

    Args:
        config: of transformers.

    Raises:
        InputError: an architecture that is not known here, and the way round.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"--format gguf: {kind or 'this model'}: known here are "
            f"{', '.join(_ARCHITECTURES)}; {_CONVERTER}"
        )
    architecture, interleaves = _ARCHITECTURES[kind]
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return Layout(architecture, int(config.num_hidden_layers), heads, kv_heads, interleaves)


def layout_of_file(architecture: str, tensors: list[str], facts: Mapping[str, int]) -> Layout:
    """The layout of an adapter's file, as far as the file tells it.

    Args:
        architecture: llama.cpp's name of it.
        tensors: names of its tensors.
        facts: `heads` and `kv_heads`, where they are known.

    Raises:
        InputError: an architecture that is not known here, or one whose rows are interleaved by
            heads that nothing counts.
    """
    known = dict(_ARCHITECTURES.values())
    if architecture not in known:
        raise InputError(f"architecture {architecture!r}; known here are {', '.join(known)}")
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))]
    turned = any(re.search(r"\.attn_[qk]\.", name) for name in tensors)
    if known[architecture] and turned and not facts.get("heads"):
        raise InputError(
            "the rows of its q and k are interleaved by heads, and it does not say how many there "
            "are: put the base's config.json beside it"
        )
    heads = facts.get("heads", 0)
    layers = max(numbers, default=-1) + 1
    kv_heads = facts.get("kv_heads") or heads
    return Layout(architecture, layers, heads, kv_heads, known[architecture])
