"""Generates greedy answers that stop at the end of their turn and do not depend on their batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.model.device import device_of
from fedlora.model.per_model import PerModel

_MARK = "\ue000\uf8ff\ue001"


@dataclass(frozen=True)
class Ends:
    """What ends an answer.

    Args:
        ids: tokens that end it: end of text, and the special token that ends a turn.
        text: text that ends it, where the template ends a turn with ordinary tokens (`<|im_end|>`
            with a tokenizer that has no such token); empty: there is none.
    """

    ids: frozenset[int]
    text: str = ""


def ends_of(model: Any, tokenizer: Any) -> Ends:
    """What ends an answer: the model's end-of-text tokens, and its chat template's turn end."""
    own = getattr(model.generation_config, "eos_token_id", None)  # some models have several
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    end = _turn_end(tokenizer)
    end_ids = list(tokenizer(end, add_special_tokens=False)["input_ids"]) if end else []
    plain = tokenizer.decode(end_ids, skip_special_tokens=True).strip()
    special = [i for i in end_ids if i in specials_of(tokenizer)]
    return Ends(frozenset({*ids, *special[:1]} if not plain else ids), plain)


def _turn_end(tokenizer: Any) -> str:
    """What the chat template writes after the last answer."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # the template needs more than two turns; answers then end without it
        return ""
    return text.partition(_MARK)[2].strip()


def specials_of(tokenizer: Any) -> set[int]:
    """Ids of the tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


# --- what is answered ---


def text_of(ids: Sequence[int], ends: Ends, tokenizer: Any) -> str:
    """The text of an answer's tokens, before the end."""
    cut = next((n for n, i in enumerate(ids) if i in ends.ids), len(ids))
    text = str(tokenizer.decode(list(ids[:cut]), skip_special_tokens=True))
    return (text.partition(ends.text)[0] if ends.text else text).strip()


# --- generation ---


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to tokenised prompts, each to the end of its turn.

    Prompts of different lengths are padded on the left, unless padding changes what this model
    answers, see `batching`.
    """
    ends = ends_of(model, tokenizer)
    tokens = answers(model, tokenizer, prompts, max_new_tokens, [ends] * len(prompts))
    return [text_of(ids, ends, tokenizer) for ids in tokens]


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[Ends],
) -> list[list[int]]:
    """The tokens that follow each prompt greedily, to its own end or to `max_new_tokens`."""
    out: dict[int, list[int]] = {}
    for group in _answer_groups(model, tokenizer, prompts, max_new_tokens):
        ids, mask = _left_padded([prompts[i] for i in group], tokenizer.pad_token_id)
        stops = frozenset.intersection(*(ends[i].ids for i in group))
        sequences = _generate_tokens(
            model,
            ids,
            mask,
            tokenizer.pad_token_id,
            max_new_tokens,
            eos_token_id=sorted(stops) or NEVER,
            stopping_criteria=[_stopping_rule([ends[i] for i in group], ids.shape[1], tokenizer)],
        )
        out |= dict(zip(group, sequences[:, ids.shape[1] :].tolist(), strict=True))
    return [out[i] for i in range(len(prompts))]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    tell: Callable[[str], None],
    **sampling: Any,
) -> str:
    """Answer one prompt, telling the text as it comes; as `generate`, but piece by piece.

    Args:
        model: of transformers.
        tokenizer: the model's.
        prompt: its tokens.
        max_new_tokens: of the longest answer.
        tell: is given every piece of the text, in order. It may end the answer by an exception.
        sampling: of `model.generate`, such as `do_sample`; without it the answer is greedy.
    """
    ends = ends_of(model, tokenizer)
    streamer = _Streamer(ends, tokenizer, tell)
    ids, mask = _left_padded([prompt], tokenizer.pad_token_id)
    _generate_tokens(
        model,
        ids,
        mask,
        tokenizer.pad_token_id,
        max_new_tokens,
        eos_token_id=sorted(ends.ids) or NEVER,
        stopping_criteria=[_stopping_rule([ends], ids.shape[1], tokenizer)],
        streamer=streamer,
        **sampling,
    )
    return streamer.told


class _Streamer:
    """A streamer of transformers that tells text once no later token can change it.

    Args:
        ends: what ends the answer.
        tokenizer: the model's.
        tell: is given every piece.
    """

    def __init__(self, ends: Ends, tokenizer: Any, tell: Callable[[str], None]) -> None:
        self.ends, self.tokenizer, self.tell = ends, tokenizer, tell
        self.told, self._ids = "", list[int]()
        self._begun = False

    def put(self, tokens: Tensor) -> None:
        """Take the prompt at first, then token by token."""
        if not self._begun:
            self._begun = True
            return
        self._ids += tokens.flatten().tolist()
        text = text_of(self._ids, self.ends, self.tokenizer)
        # The last characters may begin a character of several tokens, or what ends the answer.
        self._tell(text[: max(0, len(text) - len(self.ends.text))].rstrip("\ufffd"))

    def end(self) -> None:
        """Tell what was held back."""
        self._tell(text_of(self._ids, self.ends, self.tokenizer))

    def _tell(self, text: str) -> None:
        if len(text) > len(self.told):
            piece, self.told = text[len(self.told) :], text
            self.tell(piece)


def _generate_tokens(
    model: Any, ids: Tensor, mask: Tensor, padding: int, max_new_tokens: int, **keys: Any
) -> Any:
    device = device_of(model)
    return model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=padding,
        **{"do_sample": False, **keys},
    )


def _stopping_rule(ends: Sequence[Ends], begin: int, tokenizer: Any) -> Callable[..., Tensor]:
    """A stopping rule of transformers: whether each row has come to its own end."""

    def stop(ids: Tensor, scores: Any, **others: Any) -> Tensor:
        done = []
        for row, end in zip(ids[:, begin:].tolist(), ends, strict=True):
            ended = bool(row) and row[-1] in end.ids
            if end.text and not ended:  # no token is shorter than a byte
                tail = row[-4 * len(end.text) - 4 :]
                ended = end.text in tokenizer.decode(tail, skip_special_tokens=True)
            done.append(ended)
        return torch.tensor(done, device=ids.device)

    return stop


def _left_padded(prompts: Sequence[Sequence[int]], filling: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `(prompts, longest)`."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), filling, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


# --- who can be answered in one batch ---

PADDED, EQUAL, ALONE = "padded", "equal", "alone"
NEVER = 2**31 - 1
"""An id that no token has; as the end token, it lets answers go on to their limit."""
_SHORT, _STEPS = 3, 3
_batchings = PerModel[dict[int, str]](lambda model: {})
"""For each model, the result of `batching` by the length that was tried."""


def _answer_groups(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Which prompts are answered together, by number: all, those of one length, or each alone.

    Lengths include the answers: a model whose rotary factors follow the longest sample (longrope)
    changes them while an answer grows.
    """
    numbers = list(range(len(prompts)))
    if len(prompts) == 1:
        return [numbers]
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    kind = batching(model, tokenizer, longest)
    if kind == PADDED:
        return [numbers]
    if kind == ALONE:
        return [[i] for i in numbers]
    lengths = sorted({len(prompt) for prompt in prompts})
    return [[i for i in numbers if len(prompts[i]) == length] for length in lengths]


def batching(model: Any, tokenizer: Any, longest: int) -> str:
    """In which batches a prompt of up to `longest` tokens (with its answer) is answered as alone.

    Recurrent models read padding, others count positions from it or lose tokens beyond a window,
    and some (RWKV) mix the states of a batch. Each model is tried once for each length.

    Returns:
        `PADDED`: with prompts of any length, padded on the left; `EQUAL`: with prompts of its own
        length; `ALONE`: with no other prompt.
    """
    known = _batchings(model)
    size = max(8, 1 << (longest - 1).bit_length())  # one trial for all lengths up to it
    for length in (size, longest):  # `size` may be more than the model has positions
        if length in known:
            return known[length]
        try:
            known[length] = _tried_batching(model, tokenizer, max(length - _STEPS, 2))
        except Exception:  # whatever fails for some architecture, it can answer a single prompt
            continue
        return known[length]
    known[longest] = ALONE
    return ALONE


@torch.no_grad()
def _tried_batching(model: Any, tokenizer: Any, longest: int) -> str:
    """Find out what `batching` gives for `longest` tokens, by answering a few random prompts.

    Three questions are asked. Does a long prompt get the same logits alone and beside another of
    its length? Does a short prompt, padded to that length, get the same whatever tokens are in the
    padding? And does it get the same as without padding?
    """
    source = torch.Generator().manual_seed(0)
    vocabulary, padding = model.get_input_embeddings().num_embeddings, tokenizer.pad_token_id

    def random_prompt(length: int) -> list[int]:
        ids = torch.randint(vocabulary, (length,), generator=source).tolist()
        return [i if i != padding else (i + 1) % vocabulary for i in ids]

    def logits(*prompts: list[int]) -> list[tuple[Tensor, int]]:
        return _logits(model, *_left_padded(prompts, padding), padding)

    short = random_prompt(min(_SHORT, longest - 1))
    long, beside = random_prompt(longest), random_prompt(longest)
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    leak, rounding = (1e-5, 1e-3) if wide else (1e-2, 5e-2)
    if not _same_answers(logits(long, beside), logits(long), rounding):
        return ALONE
    ids, mask = _left_padded([short, long], padding)
    other_padding = torch.where(mask.bool(), ids, torch.tensor([beside, beside]))
    one = _logits(model, ids, mask, padding)
    other = _logits(model, other_padding, mask, padding)
    unread = _same_answers(one, other, leak) and _same_answers(one, logits(short), rounding)
    return PADDED if unread else EQUAL


def _logits(model: Any, ids: Tensor, mask: Tensor, padding: int) -> list[tuple[Tensor, int]]:
    """The first row's logits of a few steps, and the token that follows each."""
    out = _generate_tokens(
        model,
        ids,
        mask,
        padding,
        _STEPS,
        eos_token_id=NEVER,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [(x[0].double(), int(x[0].argmax())) for x in out.logits]


def _same_answers(
    one: Sequence[tuple[Tensor, int]], other: Sequence[tuple[Tensor, int]], bound: float
) -> bool:
    """Whether logits agree, up to a share of their size, as long as their next tokens are equal."""
    for (x, token), (y, same) in zip(one, other, strict=True):
        if float((x - y).abs().max()) > bound * float((y - y.mean()).abs().max()):
            return False
        if token != same:  # by rounding; what follows is another text
            return True
    return True
