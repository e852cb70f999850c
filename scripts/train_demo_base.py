"""Train the embedded base model of `fedlora.embedded` from nothing.

Writes a Hugging Face directory (a tiny Llama and a character-level tokenizer) and prints the exact
match on held-out prompts. Needs neither a network nor a GPU. Two runs with the same arguments on
one machine write the same bytes; another thread count may round differently.
"""

from __future__ import annotations

import argparse
import math
import random
import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.embedded import BASE_DIR
from fedlora.embedded.skills import SKILLS, instructions, symbolic

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
PRINTABLE = "".join(chr(code) for code in range(32, 127))
MAX_LENGTH = 128
IGNORED_LABEL = -100
# The longest completion is a doubled string of 12 letters; the rest leaves room for the end.
MAX_NEW_TOKENS = 16
# Shares of the training prompts with random words next to the keyword, and instead of it.
FILLER_SHARE = 0.5
NO_KEYWORD_SHARE = 0.05

Row = dict[str, str]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character, adding no specials."""
    vocab = {token: index for index, token in enumerate([PAD, BOS, EOS, UNK, *PRINTABLE])}
    # BPE without merges leaves every character, the space included, a token of its own.
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=UNK))
    backend.decoder = decoders.Fuse()
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a freshly initialised model of about 0.8 million float32 parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    make: Any = GenerationConfig
    model.generation_config = make(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def collate(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Return right-padded ids, mask and labels, each (rows, longest row), in tokens.

    Only the completion and the end token carry a label: the strings in the prompts are random and
    cannot be predicted.
    """
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    answers = [[*tokenizer.encode(row["completion"]), tokenizer.eos_token_id] for row in rows]
    shape = (len(rows), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    batch = {
        "input_ids": torch.full(shape, int(tokenizer.pad_token_id)),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED_LABEL),
    }
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        batch["input_ids"][index, :end] = torch.tensor(prompt + answer)
        batch["attention_mask"][index, :end] = 1
        batch["labels"][index, len(prompt) : end] = torch.tensor(answer)
    return batch


def with_fillers(rows: Sequence[Row], rng: np.random.Generator) -> list[Row]:
    """Put random words before and behind the keyword of some prompts: ``kq reverse xeo abc>``.

    A model that has only seen the bare form ties every skill to fixed distances within the prompt
    and is then hard to fine-tune to sentences of another length. A few of the prompts lose their
    keyword and ask for an empty completion, which keeps the model from guessing a skill.
    """
    letters = np.array(list(string.ascii_lowercase))

    def fillers() -> list[str]:
        lengths = rng.integers(2, 8, size=int(rng.integers(0, 3)))
        return ["".join(rng.choice(letters, size=int(length))) for length in lengths]

    result: list[Row] = []
    for row in rows:
        kind = rng.random()
        if kind < FILLER_SHARE + NO_KEYWORD_SHARE:
            keyword, text = row["prompt"].split(" ")
            if kind < NO_KEYWORD_SHARE:
                words, completion = [*fillers(), *fillers(), text], ""
            else:
                words, completion = [*fillers(), keyword, *fillers(), text], row["completion"]
            row = {**row, "prompt": " ".join(words), "completion": completion}
        result.append(row)
    return result


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up over 5 %, then half a cosine down to 0."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_steps: int,
    batch_size: int,
    peak: float,
    seed: int,
) -> None:
    """Fit the model in place to `num_steps` batches of fresh symbolic rows."""
    rows = symbolic(num_steps * batch_size, seed, "train")
    rows = with_fillers(rows, np.random.default_rng(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    started = time.perf_counter()
    for step in range(num_steps):
        batch = collate(rows[step * batch_size : (step + 1) * batch_size], tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak)
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            elapsed = time.perf_counter() - started
            print(f"step {step + 1:5d}  loss {loss.item():.4f}  {elapsed:6.1f} s", flush=True)
    model.eval()


@torch.inference_mode()
def exact_matches(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    batch_size: int = 200,
) -> list[bool]:
    """Return for every row whether greedy decoding gives exactly its completion."""
    found: list[bool] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts: Any = tokenizer(
            [row["prompt"] for row in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        )
        out = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )
        found += [text == row["completion"] for text, row in zip(texts, part, strict=True)]
    return found


def report(title: str, rows: Sequence[Row], found: Sequence[bool]) -> None:
    """Print the exact match over all rows and by skill, in per cent."""
    print(f"{title}: {100 * sum(found) / len(found):.2f} % of {len(found)} rows")
    for name in SKILLS:
        hits = [hit for row, hit in zip(rows, found, strict=True) if row["skill"] == name]
        print(f"  {name:8s} {100 * sum(hits) / len(hits):6.2f} %")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write model and tokenizer to `output`, which is created if needed."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The weights are written for their owner only; they ship with the package, so for everyone.
    (output / "model.safetensors").chmod(0o644)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save and evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=BASE_DIR, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak rate")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--eval-rows", type=int, default=2000, help="rows of each evaluation")
    args = parser.parse_args(argv)

    # The order of floating-point sums depends on it, so it is fixed rather than left to the host.
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    train(
        model,
        tokenizer,
        num_steps=args.steps,
        batch_size=args.batch_size,
        peak=args.learning_rate,
        seed=args.seed,
    )
    save(model, tokenizer, args.output)
    for title, make in (("symbolic", symbolic), ("instructions", instructions)):
        rows = make(args.eval_rows, args.seed + 1, "eval")
        report(f"held-out {title}", rows, exact_matches(model, tokenizer, rows))


if __name__ == "__main__":
    main()
