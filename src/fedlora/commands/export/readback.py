"""Reads an export back by the libraries that its users have, and compares it with its origin."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.commands.eval.models import Models
from fedlora.errors import CheckpointError
from fedlora.lowrank import LowRank, to_dense

LOGITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits, relative to the largest one, by the dtype of the weights written;
the models themselves compute in float32."""
WEIGHTS = 1e-5
"""Largest distance of a module's update from what was meant, relative to its norm."""
ROUNDING = 1.5
"""Largest difference of a merged weight, in the units of `merged.largest_difference`."""
_ROWS, _LENGTH = 4, 24


@dataclass(frozen=True)
class Check:
    """One comparison of an export with what it came from.

    Args:
        what: in words.
        reached: the largest difference found.
        tolerance: the largest that is allowed; None: for information.
    """

    what: str
    reached: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.tolerance is None or self.reached <= self.tolerance

    @property
    def in_words(self) -> str:
        """The comparison in a sentence."""
        bound = "" if self.tolerance is None else f" (allowed: {self.tolerance:.0e})"
        return f"{self.what}: {self.reached:.1e}{bound}"


def enforce(checks: list[Check], where: Path) -> None:
    """Refuse an export that is not what it came from.

    Raises:
        CheckpointError: which comparison failed.
    """
    for check in checks:
        if not check.passed:
            raise CheckpointError(
                f"{where}: what was read back is not the model it came from; {check.in_words}. "
                "Nothing was kept"
            )


def token_rows(model: Any) -> Tensor:
    """Four rows of 24 tokens drawn evenly from the vocabulary, the same in every call."""
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or _LENGTH
    length = max(2, min(_LENGTH, int(positions) - 4))
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, int(text.vocab_size), (_ROWS, length), generator=draw)


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """A model's logits on these tokens, in float32 on the CPU; dropout is off."""
    model.eval()
    ids = ids.to(next(model.parameters()).device)
    out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out.float().cpu()


def logit_distance(found: Tensor, wanted: Tensor) -> float:
    """`max |found - wanted| / max |wanted|`; infinity for other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.abs().max())
    gap = float((found - wanted).abs().max())
    return gap / size if size else gap


def load_export(models: Models, path: Path, name: str = "export") -> None:
    """Load a PEFT directory beside the adapters that are on the base already.

    Raises:
        CheckpointError: PEFT cannot load it, or misses weights in it.
    """
    device = str(next(models.model.parameters()).device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one library about the other
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            models.peft.load_adapter(path, adapter_name=name, torch_device=device)
        except Exception as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: PEFT cannot load what was written: {text[:300]}"
            ) from None


@torch.no_grad()
def peft_distance(
    model: Any, deltas: Mapping[str, LowRank], norm: float, name: str = "export"
) -> float:
    """How far what PEFT adds to any module is from what was meant.

        max_modules ||dW_PEFT - dW||_F / max(||dW||_F, ||dW of all modules||_F / 1000)

    Args:
        model: of transformers, with PEFT's layers in it.
        deltas: module -> what was meant.
        norm: of all modules together.
        name: the adapter.
    """
    worst = 0.0
    for module, x in deltas.items():
        layer = model.get_submodule(module)
        if name not in layer.scaling:
            return float("inf")
        found = layer.get_delta_weight(name).float().cpu()
        wanted = to_dense(x)
        if getattr(layer, "fan_in_fan_out", False) or hasattr(
            layer.get_base_layer(), "num_embeddings"
        ):
            wanted = wanted.T
        size = max(float(wanted.norm()), norm / 1000)
        gap = float((found - wanted).norm()) if found.shape == wanted.shape else float("inf")
        worst = max(worst, gap / size if size else gap)
    return worst
