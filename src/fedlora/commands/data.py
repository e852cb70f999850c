"""Runs `fedlora data`: the data as a model reads it, and which of its tokens are learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.commands.console import quiet_libraries
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config.config import Config
from fedlora.config.sources import settings
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.data.datasets import FederatedData

HELP = """\
fedlora data [CONFIG.yaml] [--key value ...] [--show N] [--json]

Shows the tokenised data: lengths, the share of tokens a loss is taken on, rows that are dropped and
why, and N samples (3 unless given) token by token, with those that are learnt in [brackets].

Templates (--template; auto takes the first whose columns are there):
  alpaca             instruction, input or context, output or response (Alpaca, Dolly, WizardLM)
  preference         chosen, rejected, and a prompt; the chosen answer is learnt
  chat               messages, or ShareGPT's conversations, by the tokenizer's chat template
                     (--chat_template_path for another one; vicuna is built in)
  prompt_completion  prompt, completion
  text               text
  custom             --prompt_template 'Q: {question} A: ' --completion_template '{answer}'
  classification     --text_column_names, --label_column_name

  --json   one JSON object: template, rows, tokens, dropped (why -> rows), and samples as pieces of
           text with whether they are learnt
"""
SYNTAX = Syntax({"show": Option("the number of samples to show")}, CONFIGURATION, keys=True)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora data`."""
    show = take(arguments, SYNTAX)["show"] or "3"
    if not show.isdecimal():
        raise InputError(f"--show {show}: expected a number of samples")
    quiet_libraries()
    from rich.console import Console

    from fedlora.commands.views.samples import show_samples
    from fedlora.runs.absolute_paths import resolve_paths
    from fedlora.runs.session import tokenized

    config = resolve_paths(Config(**settings(arguments, EMBEDDED)))
    _, tokenizer, data = tokenized(config)
    if emit:
        emit({"event": "data", **_described(data, tokenizer, config, int(show))})
    else:
        show_samples(data, tokenizer, config, int(show), Console())
    return 0


def _described(data: FederatedData, tokenizer: Any, config: Config, number: int) -> dict[str, Any]:
    """The data as a program reads them; tokens are pieces of text."""
    from fedlora.commands.views.samples import (
        first_samples,
        quantiles,
        token_lengths,
        token_pieces,
    )
    from fedlora.data.tokenize import IGNORE

    lengths, learnt = token_lengths(data)
    samples = []
    for client, row in first_samples(data, number):
        sample: dict[str, Any] = {"client": client, "length": len(row["input_ids"])}
        if data.label_names:
            sample["label"] = data.label_names[row["label"]]
            sample["text"] = tokenizer.decode(row["input_ids"])
        else:
            pieces = token_pieces(row["input_ids"], [x != IGNORE for x in row["labels"]], tokenizer)
            sample["pieces"] = [{"text": text, "learnt": learn} for text, learn in pieces]
        samples.append(sample)
    return {
        "template": data.template,
        "rows": len(lengths),
        "clients": len(data.clients),
        "eval_rows": len(data.eval),
        "tokens": sum(lengths),
        "learnt_tokens": None if data.label_names else learnt,
        "length": dict(zip(("least", "median", "p95", "most"), quantiles(lengths), strict=True)),
        "max_length": config.max_length,
        "reach_max_length": sum(length == config.max_length for length in lengths),
        "dropped": dict(data.dropped),
        "samples": samples,
    }
