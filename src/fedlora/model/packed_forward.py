"""Runs a model's own trunk on samples that lie one after the other, without padding.

`packed_attention` keeps the samples apart, positions are counted anew in each of them, and dropout
is drawn from each client's own stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlora.data.tokenize import Tokens
from fedlora.model import packed_attention as attention
from fedlora.model.batches import collate, flatten_rows
from fedlora.model.client_dropout import client_dropout
from fedlora.model.client_rows import ClientRows, RowLayout, spans_of
from fedlora.model.decoder_layer import LayerPasses, is_frozen
from fedlora.model.device import device_of
from fedlora.model.head import head_logits, hidden_states
from fedlora.model.packed_attention import attending, running_samples
from fedlora.model.sample_groups import samples_of
from fedlora.model.trunk import replaced_forward, unpadded_trunk


class PackedForward:
    """The packed forward pass of one model.

    The model is given to each call and not held, so that it can be freed.

    Args:
        model: of transformers, with adapter layers or without.
        client_rows: of its layers.
        configs: its own configuration and those of its parts.
        padding: id of the padding token.

    Attributes:
        trunk: the model without its head; None where it has no part of this kind.
        classifier: the model gives logits for samples, not for tokens.
        offset: position of a sample's first token.
        dropouts: the model's own dropout layers.
        decoder_layers: the trunk's, where they run as one operation each (`decoder_layer`).
        dropout_layouts: of each of these, where the clients' rows lie in its input, by the input's
            number of axes.
    """

    def __init__(
        self, model: Any, client_rows: ClientRows, configs: Sequence[Any], padding: int
    ) -> None:
        self.client_rows, self.configs, self.padding = client_rows, configs, padding
        trunk = getattr(model, "base_model", model)
        self.trunk = None if trunk is model else trunk  # holding it would keep the model alive
        self.classifier = type(model).__name__.endswith("ForSequenceClassification")
        self.offset = 0
        self.dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        self.decoder_layers: list[Any] = []
        self.dropout_layouts: list[dict[int, RowLayout]] = [{} for _ in self.dropouts]

    @contextlib.contextmanager
    def running(self, parts: Sequence[Sequence[Tokens]], device: torch.device) -> Iterator[None]:
        """Set the model up to run these rows without padding.

        Args:
            parts: each client's rows, slot by slot.
            device: of the model.
        """
        lengths = [len(row["input_ids"]) for part in parts for row in part]
        owners = [client for client, part in enumerate(parts) for _ in part]
        tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
        samples = samples_of(lengths, owners, device)
        of_tokens, of_samples = spans_of(tokens), spans_of([len(part) for part in parts])
        before = [(c, getattr(c, "_attn_implementation", None)) for c in self.configs]
        with contextlib.ExitStack() as stack:
            stack.enter_context(attending(samples, self.client_rows))
            stack.enter_context(self.client_rows.divided(tokens=of_tokens, samples=of_samples))
            for number, module in enumerate(self.dropouts):
                forward = self._client_dropout(number, len(parts))
                stack.enter_context(replaced_forward(module, forward))
            for config, _ in before:
                config._attn_implementation_internal = attention.NAME
            try:
                yield
            finally:
                for config, name in before:
                    config._attn_implementation_internal = name

    def _client_dropout(self, number: int, num_clients: int) -> Callable[[Tensor], Tensor]:
        module, layouts = self.dropouts[number], self.dropout_layouts[number]
        return client_dropout(module, number, layouts, self.client_rows, num_clients)

    def _positions(self, device: torch.device) -> Tensor:
        """Every token's position in its sample, `(1, tokens)`."""
        steps = [torch.arange(n, device=device) for n in running_samples().lengths]
        return torch.cat(steps)[None] + self.offset

    @contextlib.contextmanager
    def _fast_layers(
        self, wanted: Tensor | None = None, counts: Sequence[int] = ()
    ) -> Iterator[None]:
        """Run decoder layers as one operation each, where they are known.

        Args:
            wanted: `(n,)`, the rows that are wanted of the last layer's output; None: all.
            counts: how many of these each client has.
        """
        passes = LayerPasses(self.decoder_layers, self.client_rows, wanted, counts)
        with contextlib.ExitStack() as stack:
            for layer in self.decoder_layers:
                stack.enter_context(replaced_forward(layer, passes.forward_of(layer)))
            yield

    def trunk_output(
        self, ids: Tensor, wanted: Tensor | None = None, counts: Sequence[int] = ()
    ) -> Any:
        """What the trunk makes of all token ids `(tokens,)`, within `running`.

        Args:
            ids: of all samples.
            wanted: `(n,)`, the tokens whose last hidden states are wanted; None: all.
            counts: how many of these each client has.
        """
        assert self.trunk is not None, "only a model with a trunk is packed"
        positions = self._positions(ids.device)
        # What is trained whole after the layers knows which row is whose only while all are there.
        early = bool(self.decoder_layers) and is_frozen(self.trunk.norm)
        with self._fast_layers(wanted if early else None, counts):
            out = self.trunk(input_ids=ids[None], position_ids=positions, use_cache=False)
        if wanted is not None and not early:
            out["last_hidden_state"] = out.last_hidden_state[:, wanted]
        return out

    def classifier_logits(self, model: Any, rows: Sequence[Tokens]) -> Tensor:
        """A classifier's logits `(rows, classes)`, its trunk run without padding in `running`."""
        batch = collate(rows, device_of(model), self.padding)
        del batch["labels"]
        with self._fast_layers(), unpadded_trunk(self.trunk, self._positions):
            return cast(Tensor, model(**batch).logits)

    def logits(self, model: Any, rows: Sequence[Tokens]) -> Tensor:
        """Logits of the labelled tokens, or a classifier's of the rows, `(n, ...)` in float32."""
        device = device_of(model)
        with self.running([rows], device):
            if self.classifier:
                return self.classifier_logits(model, rows).float()
            ids, predicted_at, _ = flatten_rows(rows, device)
            out = self.trunk_output(ids, predicted_at, [len(predicted_at)])
            return head_logits(model, self.trunk, out, hidden_states(out))

    def all_logits(self, model: Any, rows: Sequence[Tokens]) -> Tensor:
        """A language model's logits of all tokens `(tokens, vocabulary)`, in float32."""
        device = device_of(model)
        with self.running([rows], device):
            out = self.trunk_output(flatten_rows(rows, device)[0])
            return head_logits(model, self.trunk, out, hidden_states(out))
