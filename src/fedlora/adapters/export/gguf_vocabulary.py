"""Says what llama.cpp needs to know of a tokenizer of transformers.

Two kinds are known: byte-level BPE (Llama 3, Qwen, GPT-2), whose way to cut a text before it is
merged has a name in llama.cpp; and BPE with byte fallback, into which SentencePiece models are
turned (Llama 2, Mistral), where a token's score is the place of the merge that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CUTS = {
    f"{_ENDINGS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_ENDINGS}|{_WORDS}|\\p{{N}}|{_REST}": "qwen2",
}
"""How a text is cut before it is merged -> llama.cpp's name of that."""
_WAY_ROUND = (
    "llama.cpp's own converter may know it: --format merged, then convert_hf_to_gguf.py; the "
    "adapter alone needs no tokenizer: --parts adapter"
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp holds it.

    Args:
        model: `llama` (scores) or `gpt2` (merges).
        pre: llama.cpp's name of how texts are cut.
        tokens: by id.
        kinds: of the tokens.
        scores: of the tokens, of `llama`.
        merges: two tokens with a space between, of `gpt2`.
        special: `bos`, `eos`, `unk`, `pad` -> id.
        adds: `bos`, `eos` -> whether it is put around a text.
        space_prefix: a space is put before a text.
        chat_template: as Jinja.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    space_prefix: bool = False
    chat_template: str | None = None

    def add_to(self, writer: Any) -> None:
        """Put it into a GGUF file's header."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.model == "llama":
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """A tokenizer as llama.cpp holds it.

    Args:
        tokenizer: of transformers, of the fast kind.
        vocab_size: rows of the model's embedding; those without a token are filled.

    Raises:
        InputError: a kind that is not known here, and the way round.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"--format gguf: its tokenizer is not a fast one; {_WAY_ROUND}")
    facts = json.loads(backend.to_str())
    model = facts["model"]
    if model["type"] != "BPE" or not model.get("merges"):
        raise InputError(
            f"--format gguf: its tokenizer is {model['type']}"
            f"{'' if model.get('merges') else ' without merges'}; known here is BPE, of bytes or "
            f"with byte fallback. {_WAY_ROUND}"
        )
    pairs = [x if isinstance(x, list) else x.split(" ") for x in model["merges"]]
    tokens, kinds = _tokens(facts, vocab_size)
    common = Vocabulary(
        "gpt2",
        "",
        tokens,
        kinds,
        special=_special(tokenizer),
        adds=_added(tokenizer),
        chat_template=_template(tokenizer),
    )
    if not model.get("byte_fallback"):
        return replace(common, pre=_cut(facts), merges=[f"{a} {b}" for a, b in pairs])
    places = {a + b: -float(i) for i, (a, b) in reversed(list(enumerate(pairs)))}
    return replace(
        common,
        model="llama",
        pre="default",
        scores=[places.get(token, 0.0) for token in tokens],
        space_prefix=_prepends_space(facts),
    )


def _tokens(facts: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and its kind."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    model = facts["model"]
    for token, number in model["vocab"].items():
        if number < vocab_size:
            is_byte = model.get("byte_fallback") and token.startswith("<0x") and len(token) == 6
            tokens[number], kinds[number] = token, BYTE if is_byte else NORMAL
    for added in facts.get("added_tokens") or ():
        if added["id"] < vocab_size:
            tokens[added["id"]] = added["content"]
            unknown = added["content"] == model.get("unk_token")
            kind = UNKNOWN if unknown else CONTROL if added["special"] else USER_DEFINED
            kinds[added["id"]] = kind
    return tokens, kinds


def _special(tokenizer: Any) -> dict[str, int]:
    """The ids of special tokens that there are."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    ids["pad"] = getattr(tokenizer, "pad_token_id", None)
    return {name: int(number) for name, number in ids.items() if number is not None}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Which special tokens are put around a text."""
    ids = tokenizer("a")["input_ids"]
    return {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def _prepends_space(facts: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer, before = facts.get("normalizer") or {}, facts.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or (
        before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never"
    )


def _cut(facts: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts a text.

    Raises:
        InputError: it has none that is known here.
    """
    before = facts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    patterns = [str((s.get("pattern") or {}).get("Regex")) for s in steps if s["type"] == "Split"]
    byte_level = [s for s in steps if s.get("type") == "ByteLevel"]
    if byte_level and len(patterns) == 1 and patterns[0] in _CUTS:
        return _CUTS[patterns[0]]
    if byte_level and not patterns and len(steps) == 1 and byte_level[0].get("use_regex", True):
        return "gpt-2"
    raise InputError(
        "--format gguf: how its tokenizer cuts texts is not known here (known: Llama 3's, Qwen's, "
        f"GPT-2's); {_WAY_ROUND}"
    )
