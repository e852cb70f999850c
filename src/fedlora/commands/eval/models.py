"""Loads one base and all wanted adapters on it, as a user of the results would."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from fedlora.commands.eval.subject import BASE, Subject
from fedlora.errors import InputError
from fedlora.model.dtype import resolve_dtype
from fedlora.model.loading import greedy, load_pretrained
from fedlora.model.sources import load_tokenizer


class Models:
    """A base model and adapters that take turns on it; only one copy of the base is held.

    Args:
        model: of transformers, PEFT's layers in it.
        peft: PEFT's model around it; None without an adapter.
        tokenizer: with a padding token.
        dtype: of the base.
    """

    def __init__(self, model: Any, peft: Any, tokenizer: Any, dtype: str) -> None:
        self.model, self.peft, self.tokenizer, self.dtype = model, peft, tokenizer, dtype

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The transformers model, being the base or one of the adapters for a while."""
        if self.peft is not None and name != BASE:
            self.peft.set_adapter(name)
        base = self.peft is not None and name == BASE
        with self.peft.disable_adapter() if base else nullcontext():
            self.model.eval()
            yield self.model

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        text = self.model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or 0
        return int(positions) if 0 < positions < 10**6 else 2048


def load_models(
    subject: Subject, wanted: Sequence[str], tokenizer: Any = None, label_names: Sequence[str] = ()
) -> Models:
    """Load the base once, and each adapter on it.

    Args:
        subject: where they are.
        wanted: model names.
        tokenizer: one that was loaded already.
        label_names: a classifier's, in the order of their ids.

    Raises:
        InputError: a model cannot be loaded, or an adapter does not fit the base.
    """
    config = subject.config
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    if config.dtype == "auto":
        dtype, _ = resolve_dtype(subject.source.config, device)
        config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    tokenizer = tokenizer or tokenizer_of(subject)
    model, _ = load_pretrained(subject.source, config.dtype, config.seed, label_names)
    embeddings = model.get_input_embeddings()
    if embeddings is not None and len(tokenizer) > embeddings.num_embeddings:
        raise InputError(
            f"{subject.name}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{embeddings.num_embeddings}; they do not belong together"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if not label_names:
        model.generation_config = greedy(model)
    model.to(device).eval().requires_grad_(False)
    peft = None
    for name in wanted:
        if name != BASE:
            peft = _with_adapter(peft, model, name, subject, device)
    return Models(model, peft, tokenizer, config.dtype)


def tokenizer_of(subject: Subject) -> Any:
    """The tokenizer of the run, or the one beside the adapter, or the base's own.

    Raises:
        InputError: it cannot be loaded.
    """
    config = subject.config
    tokenizer_name = str(subject.tokenizer) if subject.tokenizer else config.tokenizer_name
    return load_tokenizer(
        subject.source, tokenizer_name, config.chat_template_path, generates=not subject.classifies
    )


def _with_adapter(peft: Any, model: Any, name: str, subject: Subject, device: torch.device) -> Any:
    """The model with one more adapter that PEFT loads; the first one wraps it."""
    from peft import PeftModel

    path: Path = subject.adapters[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one library about the other
        # Weights that a file lacks stay as they were drawn: that is no adapter to be measured.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            if peft is None:
                return PeftModel.from_pretrained(
                    model, path, adapter_name=name, torch_device=str(device)
                ).eval()
            peft.load_adapter(path, adapter_name=name, torch_device=str(device))
            return cast(Any, peft).eval()
        except Exception as error:
            text = " ".join(str(error).split())
            raise InputError(
                f"{path}: cannot be loaded on {subject.source.name}: {text[:300]}; --base names "
                "another base model"
            ) from None
