"""Runs forward and backward passes that compute nothing that is not needed.

Samples lie one after the other without padding (`attention.py` keeps them apart), the output head
runs on the labelled tokens alone and in chunks, and several clients share one pass. Whether an
architecture can be run so is found out once (`packing.py`); where it cannot, samples are padded and
clients train one at a time. Whatever is run, a row gets what the model's own pass of it alone
gives: rows that would feel each other are run in passes of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data.tokenize import Tokens
from fedlora.model import packed_attention as attention
from fedlora.model import packing
from fedlora.model.batches import collate, count_labelled, flatten_rows
from fedlora.model.client_rows import ClientRows, Form, Span, mix_seed, spans_of
from fedlora.model.find_rows import find_rows
from fedlora.model.full_modules import full_modules_of
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.loss import CrossEntropy, summed_loss
from fedlora.model.packed_attention import PackingError, attending, running_samples, samples_of
from fedlora.model.packing import UNBOUNDED, RotaryFactors
from fedlora.model.per_model import PerModel
from fedlora.model.plans import PassKind, consecutive_passes, plan_passes
from fedlora.model.rms_norm import fast_norm
from fedlora.model.torch_generator import borrowed_generator
from fedlora.model.trunk import replaced_forward, unpadded_trunk
from fedlora.model.wide import ForwardState

CHUNK_NUMBERS = 2**24
"""Logits held at once, as numbers: 64 MiB in float32."""


@dataclass(frozen=True)
class PassResult:
    """What a pass has computed.

    Args:
        losses: by client, the weighted sum of its cross-entropies.
        slots: token slots computed, padding among them.
    """

    losses: list[float]
    slots: int


class PackedRunner:
    """How one model is run; `runner_of` keeps one for each.

    Args:
        model: of transformers, in the state in which it is to be compared: nothing of it changes.

    Attributes:
        packed: samples are run without padding.
        joint: several clients can share a pass: nothing draws from torch's own generator.
        together: samples of different lengths can be padded to one length.
        longest: tokens of a packed pass up to which it is known to be right.
        longest_padded: of a sample up to which it is known that padding changes nothing.
        auxiliary: the model's own loss is `CE + auxiliary aux_loss`.

    Raises:
        InputError: the model's configuration asks for an auxiliary loss that cannot be computed.
    """

    def __init__(self, model: Any) -> None:
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
        self.client_rows = layers[0].client_rows if layers else ClientRows()
        self.padding = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self.trunk = getattr(model, "base_model", model)
        self.classifier = type(model).__name__.endswith("ForSequenceClassification")
        self.offset = 0
        self.packed = self.joint = self.together = False
        self.longest = self.longest_padded = UNBOUNDED
        self.auxiliary = 0.0
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        self._dropout_forms: list[dict[int, Form]] = [{} for _ in self._dropouts]
        self._norms = [(m, f) for m in model.modules() if (f := fast_norm(m)) is not None]
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = list(configs.values())
        self._kept = ForwardState(model)
        self._factors = RotaryFactors(self._kept, self._configs, self.padding)
        if self.trunk is model:  # holding it would keep the model alive
            self.trunk = None
        if self._configs:
            attention.register()
            self._find_out(model)
            if self.joint:
                self.joint = self._rows_are_known(model)

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
        losses, slots = [0.0] * len(parts), 0
        for step in plan_passes(parts, partial(self._kind, model), self.longest):
            part = [step.rows.get(k, []) for k in range(len(parts))]
            again = seeds
            if seeds is not None and any(step.numbers.values()):
                again = [
                    mix_seed(seed, n) if (n := step.numbers.get(k)) else seed
                    for k, seed in enumerate(seeds)
                ]
            done = self._run(model, step.own, part, weights, again)
            losses = [x + y for x, y in zip(losses, done.losses, strict=True)]
            slots += done.slots
        return PassResult(losses, slots)

    def _run(
        self,
        model: Any,
        own: bool,
        parts: Sequence[Sequence[Tokens]],
        weights: Sequence[float],
        seeds: Sequence[int] | None,
    ) -> PassResult:
        """One pass and its backward pass."""
        if self._factors.follow:
            self._kept.restore()
        if own:
            return self._backward_padded(model, parts, weights, seeds)
        rows = [row for part in parts for row in part]
        counts = [count_labelled(part) for part in parts]
        device = _device(model)
        each = torch.cat(
            [
                torch.full((n,), w, dtype=torch.float32, device=device)
                for n, w in zip(counts, weights, strict=True)
            ]
        )
        streams = contextlib.nullcontext() if seeds is None else self.client_rows.seeded(seeds)
        try:
            with streams, self._packing(parts, device):
                if self.classifier:
                    losses = self._classified(model, rows, each)
                else:
                    losses = self._learnt(model, parts, counts, each)
        except PackingError:  # of the forward pass, before any gradient
            self._bound(rows)
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
        losses, slots, device = [0.0] * len(parts), 0, _device(model)
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
                loss, _, _ = self._padded(model, part)
                (loss * weights[client]).backward()
            losses[client] = float(loss.detach()) * weights[client]
            slots += max(len(row["input_ids"]) for row in part) * len(part)
        return PassResult(losses, slots)

    def forward(self, model: Any, rows: Sequence[Tokens]) -> Any:
        """What a packed training pass computes before its loss, with all it keeps."""
        device = _device(model)
        batch = collate(rows, device, self.padding)
        del batch["labels"]
        if any(self._kind(model, len(row["input_ids"]))[0] for row in rows):
            return model(**batch).logits
        with self.client_rows.seeded([0]), self._packing([rows], device):
            if not self.classifier:
                return self._trunk_output(flatten_rows(rows, device)[0])
            return self._row_logits(model, rows)

    def scored(self, model: Any, rows: Sequence[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits in float32 `(n, vocabulary or classes)` and labels `(n,)`, chunk by chunk."""

        def kind(length: int) -> PassKind:
            return self._kind(model, length, self.classifier)

        for own, part in consecutive_passes(rows, kind, self.longest):
            yield from self._scored(model, part, own)

    def _scored(
        self, model: Any, rows: Sequence[Tokens], own: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of rows that can be run in one pass."""
        if self._factors.follow:
            self._kept.restore()
        if own:
            _, logits, labels = self._padded(model, rows)
            yield logits, labels
            return
        device = _device(model)
        try:
            with self._packing([rows], device):
                ids, places, labels = flatten_rows(rows, device)
                out = self._trunk_output(ids)
                for at in self._chunks(model, len(places)):
                    yield self._logits(model, out, _hidden(out)[places[at]]), labels[at]
        except PackingError:  # before anything was given
            self._bound(rows)
            yield from self.scored(model, rows)

    # --- what shares a pass ---

    def _kind(self, model: Any, length: int, padded: bool = False) -> PassKind:
        """How a sample is run: whether by the model's own pass, and which others it may join."""
        if self.packed and not padded and length <= self.longest:
            return False, self._factors.alike(model, length)
        if self.together and length <= self.longest_padded:
            return True, self._factors.alike(model, length)
        return True, length

    def _bound(self, rows: Sequence[Tokens]) -> None:
        """Run smaller passes from now on: this one could not be packed."""
        lengths = [len(row["input_ids"]) for row in rows]
        self.longest = max(max(lengths) - (len(rows) == 1), sum(lengths) // 2)
        if len(rows) == 1:
            self.longest = lengths[0] - 1

    # --- packed ---

    def _learnt(
        self,
        model: Any,
        parts: Sequence[Sequence[Tokens]],
        counts: Sequence[int],
        weights: Tensor,
    ) -> Tensor:
        """Weighted cross-entropies `(labelled tokens,)`, detached, after the backward pass."""
        ids, places, labels = flatten_rows([row for part in parts for row in part], weights.device)
        out = self._trunk_output(ids)
        picked = _hidden(out)[places]
        apart = picked.detach().requires_grad_(picked.requires_grad)
        losses, ends = [], spans_of(counts)
        for at in self._chunks(model, len(places)):
            with self.client_rows.divided(chunked=True, tokens=_within(ends, at)):
                logits = self._logits(model, out, apart[at])
                loss: Tensor = CrossEntropy.apply(logits, labels[at], weights[at])  # type: ignore[no-untyped-call]
                loss.sum().backward()
            losses.append(loss.detach())
            del logits, loss
        if not self.auxiliary:
            if apart.grad is not None:
                picked.backward(apart.grad)
            return torch.cat(losses)
        extra = self._auxiliaries(model, out, parts)  # (clients,)
        share = self.auxiliary * torch.stack([w.sum() for w in weights.split(list(counts))])
        ends_in = [x for x in (picked, (extra * share).sum()) if x.requires_grad]
        begins = [apart.grad, None][-len(ends_in) :] if ends_in else []
        torch.autograd.backward(ends_in, begins)
        each = torch.repeat_interleave(extra.detach(), torch.tensor(counts, device=extra.device))
        return torch.cat(losses) + self.auxiliary * each * weights

    def _auxiliaries(self, model: Any, out: Any, parts: Sequence[Sequence[Tokens]]) -> Tensor:
        """The model's own auxiliary loss of each client's tokens, 0 where it has none."""
        tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
        found, at = [], 0
        for count in tokens:
            if not count:
                found.append(torch.zeros((), dtype=torch.float32, device=_device(model)))
                continue
            own = tuple(x[at : at + count] for x in out.router_logits)
            given = type(out)(
                last_hidden_state=out.last_hidden_state[:, :1].detach(), router_logits=own
            )
            with replaced_forward(self.trunk, lambda *_, given=given, **__: given):
                ids = torch.zeros(1, 1, dtype=torch.long, device=_device(model))
                found.append(model(input_ids=ids, use_cache=False).aux_loss)
            at += count
        return torch.stack(found)

    def _classified(self, model: Any, rows: Sequence[Tokens], weights: Tensor) -> Tensor:
        """Weighted cross-entropies `(rows,)`, detached, after the backward pass."""
        labels = torch.tensor([row["label"] for row in rows], device=weights.device)
        logits = self._row_logits(model, rows).float()
        loss = F.cross_entropy(logits, labels, reduction="none") * weights
        loss.sum().backward()
        return loss.detach()

    def _row_logits(self, model: Any, rows: Sequence[Tokens]) -> Tensor:
        """A classifier's logits `(rows, classes)`, its trunk run without padding."""
        batch = collate(rows, _device(model), self.padding)
        del batch["labels"]
        with unpadded_trunk(self.trunk, self._positions):
            return cast(Tensor, model(**batch).logits)

    @contextlib.contextmanager
    def _packing(self, parts: Sequence[Sequence[Tokens]], device: torch.device) -> Iterator[None]:
        """All that makes a pass without padding one, for these rows of these clients."""
        lengths = [len(row["input_ids"]) for part in parts for row in part]
        whose = [client for client, part in enumerate(parts) for _ in part]
        tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
        samples = samples_of(lengths, whose, device)
        of_tokens, of_samples = spans_of(tokens), spans_of([len(part) for part in parts])
        before = [(c, getattr(c, "_attn_implementation", None)) for c in self._configs]
        with contextlib.ExitStack() as stack:
            stack.enter_context(attending(samples, self.client_rows))
            stack.enter_context(self.client_rows.divided(tokens=of_tokens, samples=of_samples))
            for number, module in enumerate(self._dropouts):
                stack.enter_context(
                    replaced_forward(module, self._dropout(module, number, len(parts)))
                )
            for norm, forward in self._norms:
                stack.enter_context(replaced_forward(norm, forward))
            for config, _ in before:
                config._attn_implementation_internal = attention.NAME
            try:
                yield
            finally:
                for config, name in before:
                    config._attn_implementation_internal = name

    def _dropout(self, module: nn.Dropout, number: int, clients: int) -> Callable[[Tensor], Tensor]:
        """A dropout layer that draws from each client's own stream."""

        def forward(x: Tensor) -> Tensor:
            if not module.training or not self.client_rows.streams:
                return F.dropout(x, module.p, module.training)
            form = self._dropout_forms[number].get(x.ndim)
            if form is None or form.in_order(x):
                return dropped(x, form)
            return form.back(dropped(form.first(x, self.client_rows.number(form.unit)), form))

        def dropped(x: Tensor, form: Form | None) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            each = len(rows) // self.client_rows.number(form.unit) if form else 1
            parts = []
            for span in self.client_rows.spans(len(rows), clients, form):
                part = rows[span.begin : span.end]
                drawn = part.shape, module.p, x.device, span.first, each
                keep = self.client_rows.keep(span.client, 1_000_000 + number, *drawn)
                parts.append(part * (keep.to(x.dtype) / (1 - module.p)))
            return torch.cat(parts).view_as(x)

        return forward

    def _positions(self, device: torch.device) -> Tensor:
        steps = [torch.arange(n, device=device) for n in running_samples().lengths]
        return torch.cat(steps)[None] + self.offset

    def _trunk_output(self, ids: Tensor) -> Any:
        """What the trunk makes of all tokens."""
        places = self._positions(ids.device)
        return self.trunk(input_ids=ids[None], position_ids=places, use_cache=False)

    def _logits(self, model: Any, out: Any, hidden: Tensor) -> Tensor:
        """What the model makes of a part of its trunk's output: `(n, vocabulary)`, float32."""
        given = type(out)(**{**out, "last_hidden_state": hidden[None]})
        with replaced_forward(self.trunk, lambda *_, **__: given):
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return cast(Tensor, model(input_ids=ids, use_cache=False).logits)[0].float()

    def _chunks(self, model: Any, number: int) -> Iterator[slice]:
        size = max(64, CHUNK_NUMBERS // model.get_input_embeddings().num_embeddings)
        for at in range(0, number, size):
            yield slice(at, min(at + size, number))

    # --- padded ---

    def _padded(self, model: Any, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        batch = collate(rows, _device(model), self.padding)
        return summed_loss(model, batch, self.auxiliary)

    # --- whether it can be packed ---

    def _find_out(self, model: Any) -> None:
        rows = packing.random_rows(model, self.padding, self.classifier)
        training = model.training
        model.eval()

        def packed(rows: Sequence[Tokens], offset: int) -> Tensor:
            self.offset = offset
            return self._outputs(model, rows)

        try:
            with self.client_rows.without_clients():
                found = packing.examine(
                    model,
                    self._configs,
                    self._factors,
                    rows,
                    lambda rows: self._padded(model, rows)[1],
                    None if self.trunk is None else packed,
                )
                self.packed, self.offset, self.together = found.packed, found.offset, found.together
                self.longest, self.longest_padded = found.longest, found.longest_padded
                self.auxiliary = found.auxiliary
                if self.packed:
                    self.joint = self._draws_nothing(model, rows) and not self.client_rows.mixing
        finally:
            self._kept.restore()
            model.train(training)

    def _outputs(self, model: Any, rows: Sequence[Tokens]) -> Tensor:
        with self._packing([rows], _device(model)):
            if self.classifier:
                return self._row_logits(model, rows).float()
            ids, places, _ = flatten_rows(rows, _device(model))
            out = self._trunk_output(ids)
            return self._logits(model, out, _hidden(out)[places])

    def _draws_nothing(self, model: Any, rows: Sequence[Tokens]) -> bool:
        """Whether a training pass leaves torch's own generator alone."""
        model.train()
        devices = [_device(model)] if _device(model).type == "cuda" else []
        with borrowed_generator(devices), self.client_rows.seeded([0]):
            before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            self._outputs(model, rows)
            after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        model.eval()
        return all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    def _rows_are_known(self, model: Any) -> bool:
        """Find out where the clients' rows lie in all that must tell them apart."""
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]

        def run(rows: Sequence[Tokens]) -> None:
            if self.classifier:
                self.forward(model, rows)
                return
            with self._packing([rows], _device(model)):
                out = self._trunk_output(flatten_rows(rows, _device(model))[0])
                self._logits(model, out, _hidden(out))

        training = model.training
        model.eval()
        with self.client_rows.without_clients(), torch.no_grad():
            others = [*layers, *self._dropouts]
            draw = partial(packing.random_rows, model, self.padding, self.classifier)
            known, forms = find_rows(draw, full_modules_of(model), others, run)
        model.train(training)
        for layer in layers:
            layer.forms = forms[layer]
        self._dropout_forms = [forms[module] for module in self._dropouts]
        return known


runner_of = PerModel(PackedRunner)
"""How a model is run, `model -> PackedRunner`; found out once."""


def _hidden(out: Any) -> Tensor:
    """`(tokens, width)`."""
    return cast(Tensor, out.last_hidden_state).squeeze(0)


def _device(model: Any) -> torch.device:
    return cast(torch.device, next(model.parameters()).device)


def _within(spans: Sequence[Span], at: slice) -> tuple[Span, ...]:
    """The spans of a slice of rows, counted from its beginning."""
    out = []
    for span in spans:
        begin, end = max(span.begin, at.start), min(span.end, at.stop)
        if begin < end:
            first = span.first + begin - span.begin
            out.append(Span(span.client, begin - at.start, end - at.start, first))
    return tuple(out)
