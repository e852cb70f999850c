"""Computes attention over samples that lie side by side without padding, each by itself.

    o_t = sum_{u <= t, u in the same sample} softmax_u(c q_t k_u) v_u

A model's linear layers see `(1, tokens, width)`; only here samples of similar length are gathered
into padded groups. On the CPU short samples are computed with batched matrix products, in which the
matrix units are three times as fast as in torch's fused kernel's backward pass; long ones, and all
on a GPU, go through `scaled_dot_product_attention`, which needs no memory of square size.

Registered with transformers as the attention implementation `NAME`; it reads the `Samples` of the
pass that is running. Which tokens of its own sample a token may look at (windows, chunks) is what
the model itself says: transformers hands its mask functions to `sample_mask`, at the length being
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fedlora.model.attention_kernels import AttentionProducts, fused_attention
from fedlora.model.client_rows import ClientRows
from fedlora.model.sample_groups import Samples

NAME = "fedlora_packed"
SITES = 2_000_000
"""Where attention's sites of dropout begin, see `ClientRows.keep`."""
SITES_OF_LAYER = 10_000
"""Sites between one attention layer and the next: one for each sample of a client."""
LONGEST_PRODUCT = 512
"""Samples up to this length are computed with products that are kept, length x length."""
UNKNOWN = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "attention_bias",
    "alibi",
    "head_mask",
    "indices",
    "block_indices",
)
"""Arguments that some models give to their attention and that are not supported here."""
MASK_NUMBERS = 2**20
"""Entries of masks that are compared at once."""
PLAIN = 64
"""A mask function without a window is evaluated up to this length. Beyond it, the mask is taken to
be causal, or none at all, as the layer says."""


class PackingError(RuntimeError):
    """This architecture's attention cannot be computed without padding."""


# transformers calls attention by name and gives it tensors alone, so attention has to look up which
# samples the pass holds. Context variables keep the passes of several threads apart.
_running: ContextVar[tuple[Samples, ClientRows] | None] = ContextVar("fedlora_pass", default=None)
_windows: ContextVar[set[int] | None] = ContextVar("fedlora_windows", default=None)

_as_on_gpu: ContextVar[bool] = ContextVar("fedlora_as_on_gpu", default=False)


@contextmanager
def attending(samples: Samples, client_rows: ClientRows) -> Iterator[None]:
    """Make attention keep these samples apart in all models that run in this thread meanwhile."""
    token = _running.set((samples, client_rows))
    try:
        yield
    finally:
        _running.reset(token)


def running_samples() -> Samples:
    """The samples of the pass that runs in this thread.

    Raises:
        PackingError: none runs.
    """
    running = _running.get()
    if running is None:
        raise PackingError("no packed pass is running")
    return running[0]


@contextmanager
def as_on_gpu(wanted: bool) -> Iterator[None]:
    """Let tensors of shapes alone attend as on a GPU, to find out what a pass takes there.

    Args:
        wanted: whether they do; else they attend as on the CPU.
    """
    token = _as_on_gpu.set(wanted)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)


def runs_as_products(x: Tensor, samples: Samples) -> bool:
    """Whether attention over these samples is computed as matrix products, not by a fused kernel.

    Args:
        x: a tensor of the pass, which says where it runs.
        samples: of the pass.
    """
    on_gpu = x.is_cuda or (x.is_meta and _as_on_gpu.get())
    return not on_gpu and samples.groups[0].length <= LONGEST_PRODUCT


@contextmanager
def noting_windows() -> Iterator[set[int]]:
    """Collect the window and chunk sizes of all masks that models ask for meanwhile."""
    windows = set[int]()
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


def recomputing(
    client_rows: ClientRows,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make a layer that `torch.utils.checkpoint` computes again draw and attend as it did at first.

    On a GPU the second computation runs in a thread of autograd's, which would not see the context
    variable of the pass: the samples are handed on explicitly.

    Returns:
        Contexts for the first computation and for the second.
    """
    first, again = client_rows.recomputing()
    running = _running.get()

    @contextmanager
    def as_then() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(again)
            if running is not None:
                stack.enter_context(attending(*running))
            yield

    return first, as_then()


def _dropout_factors(
    samples: Samples, client_rows: ClientRows, layer: int, heads: int, p: float, like: Tensor
) -> list[Tensor]:
    """Dropout on the probabilities: `keep / (1 - p)` of every group, `(heads * size, l, l)`.

    Every sample has a site of its own, numbered within its client's samples of the pass, so that it
    draws the same whatever other clients are in the pass and however samples are grouped.

    Args:
        samples: of the pass.
        client_rows: of the model.
        layer: the attention layer's number.
        heads: of the layer.
        p: the share of probabilities that is dropped.
        like: gives device and dtype.
    """
    factors = []
    for group in samples.groups:
        padded = like.new_zeros(heads, group.size, group.length, group.length)
        for row, sample in enumerate(group.samples):
            client, length = samples.clients[sample], samples.lengths[sample]
            of_client = sample - samples.clients.index(client)
            site = SITES + SITES_OF_LAYER * layer + of_client
            keep = client_rows.keep(client, site, (heads, length, length), p, like.device)
            # Computed in float32 first, whatever torch's default dtype is.
            padded[:, row, :length, :length] = keep.float() / (1 - p)
        factors.append(padded.view(-1, group.length, group.length))
    return factors


def sample_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """The mask of a single sample by the model's own rule; transformers calls it for a pass.

    Args:
        batch_size, kv_length: of the pass.
        mask_function: `(batch, head, i, j)` -> whether token i may attend to token j.
        local_size: size of the window or chunk beyond which tokens are masked.
        use_vmap: the model has changed the rule in a way of its own.

    Returns:
        `(1, 1, length, length)`, bool, for the longest sample; its upper left corner is the mask of
        a shorter one. None: causal or unmasked, as the layer's `is_causal` says.

    Raises:
        PackingError: the rule depends on where in the pass a sample lies.
    """
    running = _running.get()
    if running is None or (batch_size, kv_length) != (1, sum(running[0].lengths)):
        raise PackingError(f"a mask over {batch_size} x {kv_length}")
    samples, windows = running[0], _windows.get()
    longest = samples.groups[0].length
    if local_size is not None and windows is not None:
        windows.add(int(local_size))
    short = longest <= local_size if local_size is not None else longest > PLAIN
    if short and not use_vmap:
        return None
    mask = _mask_of_one(samples.lengths, mask_function, samples.groups[0].gather.device)
    if bool(mask.all()) or torch.equal(mask, torch.ones_like(mask).tril()):
        return None
    return mask[None, None]


def _mask_of_one(
    lengths: Sequence[int], mask_function: Callable[..., Tensor], device: torch.device
) -> Tensor:
    """The rule's mask of the longest sample, `(length, length)`; that of a shorter one begins it.

    Many samples are asked about at a time: a rule is a dozen short operations.

    Raises:
        PackingError: the rule depends on where in the pass a sample lies.
    """
    sizes = torch.tensor(lengths, device=device)[:, None]
    longest, at = max(lengths), lengths.index(max(lengths))
    steps = torch.arange(longest, device=device)
    # A shorter sample's last token stands for what it lacks: a rule may look up what lies there.
    tokens = sizes.cumsum(0) - sizes + torch.minimum(steps, sizes - 1)  # (samples, longest)
    real, zero = steps < sizes, torch.zeros(1, 1, dtype=torch.long, device=device)

    def asked(part: Tensor) -> Tensor:
        attended = mask_function(zero, zero, part[:, :, None], part[:, None, :])
        return attended.expand(len(part), longest, longest)

    mask = asked(tokens[at : at + 1])[0]
    number = max(1, MASK_NUMBERS // longest**2)
    for begin in range(0, len(lengths), number):
        part = slice(begin, begin + number)
        both = real[part, :, None] & real[part, None, :]
        if bool(((asked(tokens[part]) != mask) & both).any()):
            raise PackingError("a mask that depends on a sample's place in the pass")
    return mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls: `(1, heads, tokens, d)` -> `(1, tokens, heads, d)`.

    It is left out of compiled graphs, because samples lie differently in every step and each step
    would compile a graph of its own.

    Raises:
        PackingError: a form of attention that is not known here.
    """
    running = _running.get()
    unknown = [k for k in UNKNOWN if others.get(k) is not None]
    if running is None or unknown:
        raise PackingError(f"attention with {', '.join(unknown) or 'no samples'}")
    samples, client_rows = running
    mask = sample_mask_of(attention_mask, sliding_window, samples.groups[0].length)
    client_rows.mixing |= client_rows.running_full_modules > 0
    if query.shape[0] != 1 or {query.shape[2], key.shape[2]} != {sum(samples.lengths)}:
        raise PackingError(f"attention over {tuple(query.shape)}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (x.squeeze(0) for x in (query, key, value))  # (heads, tokens, d)
    heads, scale = len(q), query.shape[-1] ** -0.5 if scaling is None else scaling
    if len(k) != heads:  # several heads of queries share one of keys and values
        k, v = (x.repeat_interleave(heads // len(k), dim=0) for x in (k, v))
    products = runs_as_products(q, samples)
    if not products and not dropout:
        return fused_attention(q, k, v, samples.groups, causal, mask, scale)[None], None
    factors = None
    if dropout:  # torch's kernel would draw from its own generator, not from each client's stream
        layer = client_rows.number_of(module)
        factors = _dropout_factors(samples, client_rows, layer, heads, dropout, q)
    grouped = (samples.groups, causal, mask, scale, factors)
    out: Tensor = AttentionProducts.apply(q, k, v, *grouped)  # type: ignore[no-untyped-call]
    return out[None], None


def sample_mask_of(
    attention_mask: Tensor | None, sliding_window: int | None, longest: int
) -> Tensor | None:
    """The mask `(longest, longest)` that `sample_mask` made for the model; None: there is none.

    Raises:
        PackingError: the model's mask was made by something else.
    """
    if attention_mask is None:
        if sliding_window is not None and sliding_window < longest:
            raise PackingError(f"a window of {sliding_window} without a mask")
        return None
    if attention_mask.dtype != torch.bool or attention_mask.shape != (1, 1, longest, longest):
        raise PackingError(f"attention with a mask of shape {tuple(attention_mask.shape)}")
    return attention_mask[0, 0]


def register() -> None:
    """Make `NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sample_mask)
