"""`fedlora data`: the data as a model reads it, and which of its tokens are learnt."""

from __future__ import annotations

from fedlora.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config import Config
from fedlora.console import quiet_libraries
from fedlora.demo import EMBEDDED
from fedlora.errors import InputError
from fedlora.json_lines import Emit
from fedlora.sources import settings

HELP = """\
fedlora data [CONFIG.yaml] [--key value ...] [--show N] [--json]

Shows the tokenised data: lengths, the share of tokens a loss is taken on, rows that are dropped and
why, and N samples (3 unless given) token by token, with those that are learnt in [brackets].

Templates (--template; auto takes the first whose columns are there):
  alpaca             instruction, input or context, output or response (Alpaca, Dolly, WizardLM)
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

    from fedlora.setup import resolve_paths, tokenized
    from fedlora.views import describe_samples, show_samples

    config = resolve_paths(Config(**settings(arguments, EMBEDDED)))
    _, tokenizer, data = tokenized(config)
    if emit:
        emit({"event": "data", **describe_samples(data, tokenizer, config, int(show))})
    else:
        show_samples(data, tokenizer, config, int(show), Console())
    return 0
