"""Runs forward and backward passes that compute nothing that is not needed.

Samples lie one after the other without padding (`attention.py` keeps them apart), the output head
runs on the labelled tokens alone and in chunks, and several clients share one pass. Whether an
architecture can be run so is found out by comparing it with its own forward pass once; where it
cannot, samples are padded and clients train one at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora import attention
from fedlora.attention import Samples, attending, samples_of
from fedlora.layout import Layout, Span, spans_of
from fedlora.model import AdapterLayer
from fedlora.norms import fast_norm
from fedlora.tokens import IGNORE, Tokens

CHUNK_NUMBERS = 2**24
"""Logits held at once, as numbers: 64 MiB in float32."""


def labelled(rows: Sequence[Tokens]) -> int:
    """What a loss is a mean over: labelled tokens (never a row's first), or a classifier's rows."""
    if rows and "label" in rows[0]:
        return len(rows)
    return sum(label != IGNORE for row in rows for label in row["labels"][1:])


def collate(
    rows: Sequence[Tokens], device: torch.device | str = "cpu", pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Rows as right-padded tensors `(batch, longest)`: input_ids, attention_mask, labels.

    A classifier's labels are `(batch,)`; `token_type_ids` go along where rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filling: int) -> Tensor:
        out = torch.full((len(rows), longest), filling, dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row[key])] = torch.tensor(row[key])
        return out.to(device)

    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        mask[i, : len(row["input_ids"])] = 1
    batch = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": mask.to(device)}
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if "label" in rows[0]:
        batch["labels"] = torch.tensor([row["label"] for row in rows], device=device)
    else:
        batch["labels"] = padded("labels", IGNORE)
    return batch


@dataclass(frozen=True)
class Done:
    """What a pass has computed.

    Args:
        losses: by client, the weighted sum of its cross-entropies.
        slots: token slots computed, padding among them.
    """

    losses: list[float]
    slots: int


class Passes:
    """How one model is run; `passes_of` keeps one for each.

    Args:
        model: of transformers, in the state in which it is to be compared: nothing of it changes.

    Attributes:
        packed: samples are run without padding.
        joint: several clients can share a pass: nothing draws from torch's own generator.
    """

    def __init__(self, model: Any) -> None:
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
        self.layout = layers[0].layout if layers else Layout()
        self.padding = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self.trunk = getattr(model, "base_model", model)
        self.classifier = type(model).__name__.endswith("ForSequenceClassification")
        self.offset = 0
        self.packed = self.joint = False
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        self._norms = [(m, f) for m in model.modules() if (f := fast_norm(m)) is not None]
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = list(configs.values())
        if self.trunk is model:  # holding it would keep the model alive
            self.trunk = None
        elif self._configs:
            attention.register()
            self._find_out(model)

    # --- training and evaluation ---

    def backward(
        self,
        model: Any,
        parts: Sequence[Sequence[Tokens]],
        weights: Sequence[float],
        seeds: Sequence[int] | None = None,
    ) -> Done:
        """Add to the gradients those of `sum_k w_k sum_{labelled tokens of client k} CE`.

        Args:
            model: the model.
            parts: each client's rows, in the order of their seats; empty where it has none.
            weights: w_k.
            seeds: of each client's dropout in this pass; None draws from torch's generator.

        Raises:
            LayoutError: several clients, and an architecture that mixes their rows.
        """
        rows = [row for part in parts for row in part]
        if not self.packed:
            loss, _, _ = self._padded(model, rows)
            weight = next(w for w, part in zip(weights, parts, strict=True) if part)
            (loss * weight).backward()
            value = float(loss.detach()) * weight
            longest = max(len(row["input_ids"]) for row in rows)
            return Done([value if part else 0.0 for part in parts], longest * len(rows))
        counts = [labelled(part) for part in parts]
        device = _device(model)
        each = torch.cat(
            [torch.full((n,), w, device=device) for n, w in zip(counts, weights, strict=True)]
        )
        streams = contextlib.nullcontext() if seeds is None else self.layout.seeded(seeds)
        with streams, self._packing(parts, device):
            if self.classifier:
                losses = self._classified(model, rows, each)
            else:
                losses = self._learnt(model, parts, counts, each)
        sums = torch.stack([x.sum() for x in losses.split(counts)])
        return Done(sums.tolist(), sum(len(row["input_ids"]) for row in rows))

    def forward(self, model: Any, rows: Sequence[Tokens]) -> Any:
        """What a packed training pass computes before its loss, with all it keeps."""
        device = _device(model)
        with self.layout.seeded([0]), self._packing([rows], device):
            if not self.classifier:
                return self._trunk_output(_flat(rows, device)[0])
            batch = collate(rows, device, self.padding)
            del batch["labels"]
            with self._unpadded_trunk():
                return model(**batch).logits

    def scored(self, model: Any, rows: Sequence[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits in float32 `(n, vocabulary or classes)` and labels `(n,)`, chunk by chunk."""
        if not self.packed or self.classifier:
            _, logits, labels = self._padded(model, rows)
            yield logits, labels
            return
        device = _device(model)
        with self._packing([rows], device):
            ids, places, labels = _flat(rows, device)
            out = self._trunk_output(ids)
            for at in self._chunks(model, len(places)):
                yield self._logits(model, out, _hidden(out)[places[at]]), labels[at]

    # --- packed ---

    def _learnt(
        self,
        model: Any,
        parts: Sequence[Sequence[Tokens]],
        counts: Sequence[int],
        weights: Tensor,
    ) -> Tensor:
        """Weighted cross-entropies `(labelled tokens,)`, detached, after the backward pass."""
        ids, places, labels = _flat([row for part in parts for row in part], weights.device)
        out = self._trunk_output(ids)
        picked = _hidden(out)[places]
        apart = picked.detach().requires_grad_(picked.requires_grad)
        losses, ends = [], spans_of(counts)
        for at in self._chunks(model, len(places)):
            inside = {at.stop - at.start: _within(ends, at)}
            with self.layout.divided(inside):
                logits = self._logits(model, out, apart[at])
                loss: Tensor = _CrossEntropy.apply(logits, labels[at], weights[at])  # type: ignore[no-untyped-call]
                loss.sum().backward()
            losses.append(loss.detach())
            del logits, loss
        if apart.grad is not None:
            picked.backward(apart.grad)
        return torch.cat(losses)

    def _classified(self, model: Any, rows: Sequence[Tokens], weights: Tensor) -> Tensor:
        """Weighted cross-entropies `(rows,)`, detached, after the backward pass."""
        batch = collate(rows, weights.device, self.padding)
        labels = batch.pop("labels")
        with self._unpadded_trunk():
            logits = model(**batch).logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none") * weights
        loss.sum().backward()
        return loss.detach()

    @contextlib.contextmanager
    def _packing(self, parts: Sequence[Sequence[Tokens]], device: torch.device) -> Iterator[None]:
        """All that makes a pass without padding one, for these rows of these clients."""
        lengths = [len(row["input_ids"]) for part in parts for row in part]
        whose = [client for client, part in enumerate(parts) for _ in part]
        tokens = [sum(len(row["input_ids"]) for row in part) for part in parts]
        samples = samples_of(lengths, whose, device)
        spans = {len(lengths): spans_of([len(part) for part in parts])}
        spans[sum(lengths)] = spans_of(tokens)
        before = [(c, getattr(c, "_attn_implementation", None)) for c in self._configs]
        with contextlib.ExitStack() as stack:
            stack.enter_context(attending(samples, self.layout))
            stack.enter_context(self.layout.divided(spans))
            for number, module in enumerate(self._dropouts):
                stack.enter_context(_instead(module, self._dropout(module, number, len(parts))))
            for norm, forward in self._norms:
                stack.enter_context(_instead(norm, forward))
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
            if not module.training or not self.layout.streams:
                return F.dropout(x, module.p, module.training)
            rows = x.reshape(-1, x.shape[-1])
            parts = []
            for span in self.layout.spans(len(rows), clients):
                part = rows[span.begin : span.end]
                keep = self.layout.keep(
                    span.client, 1_000_000 + number, part.shape, module.p, x.device
                )
                parts.append(part * (keep.to(x.dtype) / (1 - module.p)))
            return torch.cat(parts).view_as(x)

        return forward

    def _positions(self, device: torch.device) -> Tensor:
        samples = cast(Samples, attention.running.samples)
        steps = [torch.arange(n, device=device) for n in samples.lengths]
        return torch.cat(steps)[None] + self.offset

    def _trunk_output(self, ids: Tensor) -> Any:
        """What the trunk makes of all tokens."""
        places = self._positions(ids.device)
        return self.trunk(input_ids=ids[None], position_ids=places, use_cache=False)

    def _logits(self, model: Any, out: Any, hidden: Tensor) -> Tensor:
        """What the model makes of a part of its trunk's output: `(n, vocabulary)`, float32."""
        given = type(out)(**{**out, "last_hidden_state": hidden[None]})
        with _instead(self.trunk, lambda *_, **__: given):
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return cast(Tensor, model(input_ids=ids, use_cache=False).logits)[0].float()

    def _chunks(self, model: Any, number: int) -> Iterator[slice]:
        size = max(64, CHUNK_NUMBERS // model.get_input_embeddings().num_embeddings)
        for at in range(0, number, size):
            yield slice(at, min(at + size, number))

    @contextlib.contextmanager
    def _unpadded_trunk(self) -> Iterator[None]:
        """The trunk takes and gives padded tensors, and computes without padding inside."""
        run, pooler = self.trunk.forward, getattr(self.trunk, "pooler", None)
        place: list[tuple[tuple[int, int], Tensor]] = []

        def padded(x: Tensor) -> Tensor:
            (batch, longest), where = place[-1]
            out = x.new_zeros(batch * longest, x.shape[-1]).index_copy(0, where, x[0])
            return out.view(batch, longest, -1)

        def forward(input_ids: Tensor, attention_mask: Tensor, **named: Any) -> Any:
            real = attention_mask.reshape(-1).nonzero()[:, 0]
            place.append((cast("tuple[int, int]", tuple(input_ids.shape)), real))
            if named.get("token_type_ids") is not None:
                named["token_type_ids"] = named["token_type_ids"].reshape(-1)[real][None]
            named["position_ids"] = self._positions(input_ids.device)
            out = run(input_ids=input_ids.reshape(-1)[real][None], **named)
            out["last_hidden_state"] = padded(out.last_hidden_state)
            return out

        with contextlib.ExitStack() as stack:
            stack.enter_context(_instead(self.trunk, forward))
            if isinstance(pooler, nn.Module):
                pool = pooler.forward
                stack.enter_context(_instead(pooler, lambda x, *a, **k: pool(padded(x), *a, **k)))
            yield

    # --- padded ---

    def _padded(self, model: Any, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        batch = collate(rows, _device(model), self.padding)
        return summed_loss(model, batch)

    # --- whether it can be packed ---

    def _find_out(self, model: Any) -> None:
        """Compare a packed pass with the model's own on a few random rows."""
        vocabulary = model.get_input_embeddings().num_embeddings
        source = torch.Generator().manual_seed(0)
        rows: list[Tokens] = []
        for length in (7, 3, 12):
            ids = torch.randint(vocabulary, (length,), generator=source).tolist()
            ids = [i if i != self.padding else (i + 1) % vocabulary for i in ids]
            rows.append({"input_ids": ids, "labels": ids})
        if self.classifier:
            rows = [{"input_ids": row["input_ids"], "label": 0} for row in rows]
        training = model.training
        model.eval()
        with self.layout.without_clients(), torch.no_grad():
            wanted = self._padded(model, rows)[1]
            for offset in (0, self.padding + 1):
                self.offset = offset
                if self._agrees(model, rows, wanted):
                    self.packed = True
                    break
            if self.packed:
                self.joint = self._draws_nothing(model, rows) and not self.layout.mixing
        model.train(training)

    def _agrees(self, model: Any, rows: Sequence[Tokens], wanted: Tensor) -> bool:
        # Whatever an architecture stumbles over here, it can be run with padding.
        try:
            found = self._outputs(model, rows)
        except Exception:
            return False
        if found.shape != wanted.shape:
            return False
        single = next(model.parameters()).dtype in (torch.float32, torch.float64)
        bound = 1e-3 if single else 5e-2
        return bool((found - wanted).abs().max() <= bound * wanted.abs().max())

    def _outputs(self, model: Any, rows: Sequence[Tokens]) -> Tensor:
        with self._packing([rows], _device(model)):
            if not self.classifier:
                ids, places, _ = _flat(rows, _device(model))
                out = self._trunk_output(ids)
                return self._logits(model, out, _hidden(out)[places])
        return cast(Tensor, self.forward(model, rows)).float()

    def _draws_nothing(self, model: Any, rows: Sequence[Tokens]) -> bool:
        """Whether a training pass leaves torch's own generator alone."""
        model.train()
        devices = [_device(model)] if _device(model).type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.layout.seeded([0]):
            before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
            self._outputs(model, rows)
            after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        model.eval()
        return all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


_known: WeakKeyDictionary[Any, Passes] = WeakKeyDictionary()


def passes_of(model: Any) -> Passes:
    """How this model is run; found out once."""
    if model not in _known:
        _known[model] = Passes(model)
    return _known[model]


def summed_loss(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy, in float32, of the labelled tokens or of a classifier's rows.

    Returns:
        The sum (a scalar), the logits `(n, vocabulary)` of the n labelled tokens or `(n, classes)`
        of the n rows, their labels `(n,)`.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if labels.ndim == 1:
        logits = model(**inputs).logits.float()  # (batch, classes)
    else:
        out = model(**inputs, use_cache=False)
        counted = labels[:, 1:] != IGNORE  # (batch, longest - 1)
        logits = out.logits[:, :-1][counted].float()  # (tokens, vocabulary)
        labels = labels[:, 1:][counted]
    return F.cross_entropy(logits, labels, reduction="sum"), logits, labels


def _hidden(out: Any) -> Tensor:
    """`(tokens, width)`."""
    return cast(Tensor, out.last_hidden_state).squeeze(0)


def _device(model: Any) -> torch.device:
    return cast(torch.device, next(model.parameters()).device)


def _flat(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All token ids `(tokens,)`, where a labelled token is predicted `(n,)`, and its label."""
    ids = [token for row in rows for token in row["input_ids"]]
    following = [label for row in rows for label in (*row["labels"][1:], IGNORE)]
    labels = torch.tensor(following)
    places = (labels != IGNORE).nonzero()[:, 0]
    return torch.tensor(ids).to(device), places.to(device), labels[places].to(device)


def _within(spans: Sequence[Span], at: slice) -> tuple[Span, ...]:
    """The spans of a slice of rows, counted from its beginning."""
    out = []
    for span in spans:
        begin, end = max(span.begin, at.start), min(span.end, at.stop)
        if begin < end:
            out.append(Span(span.client, begin - at.start, end - at.start))
    return tuple(out)


class _CrossEntropy(torch.autograd.Function):
    """`w_i (logsumexp(z_i) - z_i[label_i])`; the gradient `w_i (softmax(z_i) - 1[label_i])` takes
    the place of the logits, which nothing else reads.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        at, w = labels[:, None], weights[:, None]
        picked, largest = logits.gather(1, at), logits.amax(1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        ctx.gradient = logits.mul_(w / total).scatter_add_(1, at, -w)
        return ((total.log() + largest - picked) * w)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Only ever of a sum: what comes in is ones.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None, None


@contextlib.contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
