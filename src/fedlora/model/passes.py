"""Runs forward and backward passes that compute nothing that is not needed.

Samples lie one after the other without padding (`packed_forward`), the output head runs on the
labelled tokens alone and in chunks (`head`), and several clients share one pass. Whether an
architecture can be run so is found out once (`packing`, `joint_passes`); where it cannot, samples
are padded and clients train one at a time. Every row gets what the model's own pass of that row
alone would give: rows that would influence each other are run in separate passes (`plans`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.data.tokenize import Tokens
from fedlora.model import packed_attention as attention
from fedlora.model import packing
from fedlora.model.batches import collate, count_labelled, flatten_rows
from fedlora.model.client_rows import ClientRows, mix_seed, spans_of
from fedlora.model.config_lengths import UNBOUNDED
from fedlora.model.decoder_layer import decoder_layers
from fedlora.model.device import device_of
from fedlora.model.head import (
    HeadPass,
    auxiliary_losses,
    chunks,
    head_backward,
    head_logits,
    hidden_states,
)
from fedlora.model.joint_passes import draws_nothing, locate_rows
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.loss import summed_loss
from fedlora.model.packed_attention import PackingError
from fedlora.model.packed_forward import PackedForward
from fedlora.model.per_model import PerModel
from fedlora.model.plans import PassKind, PlannedPass, consecutive_passes, plan_passes
from fedlora.model.rotary_factors import RotaryFactors
from fedlora.model.torch_generator import borrowed_generator
from fedlora.model.trial_rows import random_rows
from fedlora.model.wide import ForwardState, nearly_equal


@dataclass(frozen=True)
class PassResult:
    """What a pass has computed.

    Args:
        losses: of each client, the weighted sum of its cross-entropies.
        computed: tokens that went through the model, including padding.
    """

    losses: list[float]
    computed: int


class PackedRunner:
    """Runs training and evaluation passes of one model; `runner_of` keeps one for each model.

    Args:
        model: of transformers, in the state in which it is to be compared; nothing of it changes.

    Attributes:
        packed: samples are run without padding.
        joint: several clients can share a pass: nothing draws from torch's own generator, and it is
            known where each client's rows lie.
        together: samples of different lengths can be padded to one length.
        longest: a packed pass of at most so many tokens is known to be right.
        longest_padded: padding is known to change nothing for samples of at most so many tokens.
        auxiliary: the model's own loss is `CE + auxiliary aux_loss`.

    Raises:
        InputError: the model's configuration asks for an auxiliary loss that cannot be computed.
    """

    def __init__(self, model: Any) -> None:
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
        self.client_rows = layers[0].client_rows if layers else ClientRows()
        self.padding = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self.packed = self.joint = self.together = False
        self.longest = self.longest_padded = UNBOUNDED
        self.auxiliary = 0.0
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = list(configs.values())
        self.packed_forward = PackedForward(model, self.client_rows, self._configs, self.padding)
        self._forward_state = ForwardState(model)
        self._rotary = RotaryFactors(self._forward_state, self._configs, self.padding)
        if self._configs and any(p.is_meta for p in model.parameters()):
            self._assume(model)
        elif self._configs:
            attention.register()
            # Layers that torch.compile has taken are judged as they are written: the mode that
            # computes in float64 does not reach into a compiled graph.
            with torch.compiler.set_stance("force_eager"):
                self._examine(model)
                if self.joint:
                    run = partial(self._try_pass, model)
                    self.joint = locate_rows(model, self.packed_forward, run)
            if self.packed:
                self._try_decoder_layers(model)

    # --- training and evaluation ---

    def backward(
        self,
        model: Any,
        parts: Sequence[Sequence[Tokens]],
        weights: Sequence[float],
        seeds: Sequence[int] | None = None,
    ) -> PassResult:
        """Add to the gradients those of `sum_k w_k sum_{labelled tokens of client k} CE`.

        Args:
            model: the model.
            parts: each client's rows, slot by slot; empty where it has none.
            weights: w_k.
            seeds: of each client's dropout in this pass; None draws from torch's generator.

        Raises:
            MixedRowsError: several clients, and an architecture that mixes their rows.
        """
        losses, computed = [0.0] * len(parts), 0
        for step in plan_passes(parts, partial(self._pass_kind, model), self.longest):
            rows = [step.rows.get(client, []) for client in range(len(parts))]
            streams = None if seeds is None else _streams_of(step, seeds)
            result = self._one_pass(model, step.padded, rows, weights, streams)
            losses = [x + y for x, y in zip(losses, result.losses, strict=True)]
            computed += result.computed
        return PassResult(losses, computed)

    def _one_pass(
        self,
        model: Any,
        padded: bool,
        parts: Sequence[Sequence[Tokens]],
        weights: Sequence[float],
        seeds: Sequence[int] | None,
    ) -> PassResult:
        """One pass, forwards and backwards; see `backward`."""
        if self._rotary.follow_longest:
            self._forward_state.restore()
        if padded:
            return self._backward_padded(model, parts, weights, seeds)
        rows = [row for part in parts for row in part]
        counts = [count_labelled(part) for part in parts]
        device = device_of(model)
        token_weights = torch.cat(
            [
                torch.full((n,), w, dtype=torch.float32, device=device)
                for n, w in zip(counts, weights, strict=True)
            ]
        )
        streams = contextlib.nullcontext() if seeds is None else self.client_rows.seeded(seeds)
        try:
            with streams, self.packed_forward.running(parts, device):
                if self.packed_forward.classifier:
                    losses = self._classifier_backward(model, rows, token_weights)
                else:
                    losses = self._language_model_backward(model, parts, counts, token_weights)
        except PackingError:  # of the forward pass, before any gradient
            self._shorten_passes(rows)
            return self.backward(model, parts, weights, seeds)
        sums = torch.stack([x.sum() for x in losses.split(counts)])
        return PassResult(sums.tolist(), sum(len(row["input_ids"]) for row in rows))

    def _backward_padded(
        self,
        model: Any,
        parts: Sequence[Sequence[Tokens]],
        weights: Sequence[float],
        seeds: Sequence[int] | None,
    ) -> PassResult:
        """The model's own forward pass of each client's rows, padded, and its backward pass."""
        losses, computed, device = [0.0] * len(parts), 0, device_of(model)
        for client, part in enumerate(parts):
            if not part:
                continue
            with contextlib.ExitStack() as stack:
                if len(parts) > 1:
                    stack.enter_context(self.client_rows.only(client))
                if seeds is not None:
                    stack.enter_context(self.client_rows.seeded(seeds))
                    devices = [device] if device.type == "cuda" else []
                    stack.enter_context(borrowed_generator(devices, seeds[client]))
                loss, _, _ = self._own_pass(model, part)
                (loss * weights[client]).backward()
            losses[client] = float(loss.detach()) * weights[client]
            computed += max(len(row["input_ids"]) for row in part) * len(part)
        return PassResult(losses, computed)

    def forward(self, model: Any, rows: Sequence[Tokens]) -> Any:
        """What a packed training pass computes before its loss, with all it keeps for backward."""
        device = device_of(model)
        batch = collate(rows, device, self.padding)
        del batch["labels"]
        if any(self._pass_kind(model, len(row["input_ids"])).padded for row in rows):
            return model(**batch).logits
        with self.client_rows.seeded([0]), self.packed_forward.running([rows], device):
            if not self.packed_forward.classifier:
                return self.packed_forward.trunk_output(flatten_rows(rows, device)[0])
            return self.packed_forward.classifier_logits(model, rows)

    def loss_of_shapes(self, model: Any, rows: Sequence[Tokens]) -> None:
        """A training pass of one client's rows on a model of shapes alone, whose loss nobody reads.

        It makes the tensors that the real pass makes, in the same order.

        Raises:
            PackingError: a form of attention that is not known here.
        """
        device = device_of(model)
        weights = torch.empty(count_labelled(rows), device=device)
        if not self.packed:
            loss, _, _ = self._own_pass(model, rows)
            loss.backward()
            return
        with self.client_rows.seeded([0]), self.packed_forward.running([rows], device):
            if self.packed_forward.classifier:
                self._classifier_backward(model, rows, weights)
            else:
                self._language_model_backward(model, [rows], [len(weights)], weights)

    def logits_and_labels(
        self, model: Any, rows: Sequence[Tokens]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits in float32 `(n, vocabulary or classes)` and labels `(n,)`, chunk by chunk."""

        def kind(length: int) -> PassKind:
            return self._pass_kind(model, length, self.packed_forward.classifier)

        for padded, part in consecutive_passes(rows, kind, self.longest):
            yield from self._pass_logits_and_labels(model, part, padded)

    def _pass_logits_and_labels(
        self, model: Any, rows: Sequence[Tokens], padded: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of rows that can be run in one pass."""
        if self._rotary.follow_longest:
            self._forward_state.restore()
        if padded:
            _, logits, labels = self._own_pass(model, rows)
            yield logits, labels
            return
        device = device_of(model)
        try:
            with self.packed_forward.running([rows], device):
                ids, predicted_at, labels = flatten_rows(rows, device)
                out = self.packed_forward.trunk_output(ids, predicted_at, [len(predicted_at)])
                for chunk in chunks(model, len(predicted_at)):
                    hidden = hidden_states(out)[chunk]
                    logits = head_logits(model, self.packed_forward.trunk, out, hidden)
                    yield logits, labels[chunk]
        except PackingError:  # before anything was given
            self._shorten_passes(rows)
            yield from self.logits_and_labels(model, rows)

    # --- what shares a pass ---

    def _pass_kind(self, model: Any, length: int, padded: bool = False) -> PassKind:
        """How a sample of this length is run: padded or packed, and with which others."""
        if self.packed and not padded and length <= self.longest:
            return PassKind(False, self._rotary.class_of(model, length))
        if self.together and length <= self.longest_padded:
            return PassKind(True, self._rotary.class_of(model, length))
        return PassKind(True, length)

    def _shorten_passes(self, rows: Sequence[Tokens]) -> None:
        """Run smaller passes from now on, because these rows could not be packed."""
        lengths = [len(row["input_ids"]) for row in rows]
        if len(rows) == 1:
            self.longest = lengths[0] - 1
        else:
            self.longest = max(max(lengths), sum(lengths) // 2)

    # --- packed ---

    def _language_model_backward(
        self,
        model: Any,
        parts: Sequence[Sequence[Tokens]],
        counts: Sequence[int],
        weights: Tensor,
    ) -> Tensor:
        """Weighted cross-entropies `(labelled tokens,)`, detached, after the backward pass."""
        trunk = self.packed_forward.trunk
        rows = [row for part in parts for row in part]
        ids, predicted_at, labels = flatten_rows(rows, weights.device)
        out = self.packed_forward.trunk_output(ids, predicted_at, counts)
        head = head_backward(
            model,
            trunk,
            out,
            labels,
            weights,
            spans_of(counts),
            self.client_rows,
        )
        if self.auxiliary:
            tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
            extra = auxiliary_losses(model, trunk, out, tokens)  # (clients,)
            return self._backward_with_auxiliary(head, extra, counts, weights)
        if head.gradient is not None:
            head.hidden.backward(head.gradient)
        return head.losses

    def _backward_with_auxiliary(
        self, head: HeadPass, extra: Tensor, counts: Sequence[int], weights: Tensor
    ) -> Tensor:
        """Run the trunk backwards from its head and from its routers at once.

        A client's auxiliary loss counts as one of its tokens' cross-entropies: `aux_loss` stands
        beside their mean, and the weights of its tokens make that mean of their sum.
        """
        share = self.auxiliary * torch.stack([w.sum() for w in weights.split(list(counts))])
        sources = [x for x in (head.hidden, (extra * share).sum()) if x.requires_grad]
        gradients = [head.gradient, None][-len(sources) :] if sources else []
        torch.autograd.backward(sources, gradients)
        each = torch.repeat_interleave(extra.detach(), torch.tensor(counts, device=extra.device))
        return head.losses + self.auxiliary * each * weights

    def _classifier_backward(self, model: Any, rows: Sequence[Tokens], weights: Tensor) -> Tensor:
        """Weighted cross-entropies `(rows,)`, detached, after the backward pass."""
        labels = torch.tensor([row["label"] for row in rows], device=weights.device)
        logits = self.packed_forward.classifier_logits(model, rows).float()
        loss = F.cross_entropy(logits, labels, reduction="none") * weights
        loss.sum().backward()
        return loss.detach()

    # --- padded ---

    def _own_pass(self, model: Any, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        batch = collate(rows, device_of(model), self.padding)
        return summed_loss(model, batch, self.auxiliary)

    # --- whether it can be packed ---

    def _assume(self, model: Any) -> None:
        """Take a model of shapes alone to be packed where it has a trunk: nothing can be compared.

        Its passes compute no numbers; they tell how much memory those of the real model take.
        """
        attention.register()
        self.packed = self.joint = self.packed_forward.trunk is not None
        if self.packed:
            self.packed_forward.decoder_layers = decoder_layers(self.packed_forward.trunk)

    def _try_pass(self, model: Any, rows: Sequence[Tokens]) -> None:
        """Run all of the model once, so that its modules can be watched."""
        if self.packed_forward.classifier:
            self.forward(model, rows)
        else:
            self.packed_forward.all_logits(model, rows)

    def _try_decoder_layers(self, model: Any) -> None:
        """Run decoder layers as one operation each, if that gives what the model's own give."""
        forward, training = self.packed_forward, model.training
        layers = decoder_layers(forward.trunk)
        rows = random_rows(model, self.padding, forward.classifier)
        model.eval()
        try:
            with self.client_rows.without_clients(), torch.no_grad():
                own = forward.logits(model, rows)
                forward.decoder_layers = layers
                if layers and not nearly_equal(forward.logits(model, rows), own, torch.float32):
                    forward.decoder_layers = []
        finally:
            self._forward_state.restore()
            model.train(training)

    def _examine(self, model: Any) -> None:
        """Compare the model's passes with its own pass of each row alone, and keep the verdict."""
        rows = random_rows(model, self.padding, self.packed_forward.classifier)
        training = model.training
        model.eval()

        def packed(rows: Sequence[Tokens], offset: int) -> Tensor:
            self.packed_forward.offset = offset
            return self.packed_forward.logits(model, rows)

        try:
            with self.client_rows.without_clients():
                verdict = packing.examine(
                    model,
                    self._configs,
                    self._rotary,
                    rows,
                    lambda rows: self._own_pass(model, rows)[1],
                    None if self.packed_forward.trunk is None else packed,
                )
                self.packed, self.packed_forward.offset = verdict.packed, verdict.offset
                self.together = verdict.together
                self.longest, self.longest_padded = verdict.longest, verdict.longest_padded
                self.auxiliary = verdict.auxiliary
                if self.packed:
                    reproducible = draws_nothing(model, self.packed_forward, rows)
                    self.joint = reproducible and not self.client_rows.mixing
        finally:
            self._forward_state.restore()
            model.train(training)


runner_of = PerModel(PackedRunner)
"""The runner of a model, `model -> PackedRunner`; made once for each."""


def _streams_of(step: PlannedPass, seeds: Sequence[int]) -> list[int]:
    """The seeds of a pass: a client's second pass of a step must not draw what its first drew."""
    numbers = [step.numbers.get(client, 0) for client in range(len(seeds))]
    return [mix_seed(seed, n) if n else seed for seed, n in zip(seeds, numbers, strict=True)]
