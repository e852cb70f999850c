"""Runs `fedlora eval`: benchmarks, held-out rows and forgetting of a run's models and the base."""

from __future__ import annotations

import os
import sys

from fedlora.commands.eval.options import LOADING, MODEL_OR_RUN, MODELS, Given
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import TRUTH, Option, Syntax
from fedlora.errors import InputError

HELP = """\
fedlora eval MODEL_OR_RUN [--key value ...] [--json]

Measures a run's global model, the base beside it, and clients' own models. MODEL_OR_RUN is a run's
directory (finished or not), its round-N/ or final/, any PEFT directory, a model directory, a hub
name, or embedded.

Without tasks a run is evaluated on its own held-out rows: base, global and every client's model
that was kept (save_client_models), each client's beside the global one on the client's own rows
(client_eval_fraction). A run with general_file is measured on that too.

  --tasks TASK ...         tasks of lm-evaluation-harness by name: arc_easy hellaswag mmlu gsm8k
                           truthfulqa_mc2 ...; their data comes from the hub
  --include_path DIR       tasks of your own over local files
  --num_fewshot N          worked examples in the prompt; without it the task's own number
  --apply_chat_template    put the tasks' requests as chats
  --mmlu_file F            MMLU from a file: question, choices, answer, subject; or input with
                           'Options: A. ..., B. ...', output, class
  --mmlu_dev_file F        worked examples for it (5 of each subject, or --num_fewshot)
  --mt_bench_file F        MT-bench: both turns of the questions are answered, and kept
  --mt_bench_references F  reference answers (math, reasoning, coding); without it those that stand
                           with the questions
  --judge_url URL          any OpenAI-compatible endpoint, which grades the answers from 1 to 10
  --judge_model NAME       its model (gpt-4)
  --judge_key KEY          its key; better in OPENAI_API_KEY. It is written nowhere
  --judge_timeout SECONDS  for one judgement (120); --judge_threads N at once (4)
  --max_new_tokens N       longest answer of MT-bench (1024)
  --general_file F         text (.txt, or rows with text): forgetting, how many nats per token the
                           model loses on it against the base; --general_length N tokens a window
  --held_out true|false    the run's own rows too, or not

  --models NAME ...        base, global, client-0 ..., clients, all, adapter (of a PEFT directory);
                           without it base and global
  --round N                a round of the run that is still there, instead of the final model
  --base NAME              another base model than the one an adapter names
  --limit N                items of each task or subject, rows, questions, windows; 0.1 is a share
  --batch_size N           rows at once
  --dtype, --use_cpu or --device cpu|cuda, --num_threads, --chat_template_path, --trust_remote_code
                           as in a configuration; without them the run's own
  --output_dir DIR         results go there; without it to RUN/eval and the run's metrics.jsonl, or
                           to ./eval for what is no run
  --json                   one JSON object for each model and measure (eval: name, model, scores),
                           as it is found; then end, with output_dir

Harness and judge need the extra: pip install 'fedlora[eval]'

Examples:
  fedlora eval out
  fedlora eval out --tasks arc_easy hellaswag --limit 200
  fedlora eval out --mmlu_file mmlu.jsonl --general_file wikitext.txt --models base global client-3
  OPENAI_API_KEY=... fedlora eval out --mt_bench_file question.jsonl \\
      --mt_bench_references gpt-4.jsonl --judge_url https://api.openai.com/v1 --judge_model gpt-4
"""

SYNTAX = Syntax(
    {
        "tasks": Option("tasks of lm-evaluation-harness", many=True),
        "include_path": Option("tasks of your own", path="directory"),
        "num_fewshot": Option("worked examples in the prompt"),
        "apply_chat_template": Option("put requests as chats", flag=True),
        "mmlu_file": Option("questions of MMLU", path="file"),
        "mmlu_dev_file": Option("worked examples for them", path="file"),
        "mt_bench_file": Option("questions of MT-bench", path="file"),
        "mt_bench_references": Option("reference answers", path="file"),
        "judge_url": Option("an OpenAI-compatible endpoint"),
        "judge_model": Option("the judge's model"),
        "judge_key": Option("its key"),
        "judge_timeout": Option("seconds for one judgement"),
        "judge_threads": Option("judgements at once"),
        "max_new_tokens": Option("longest answer"),
        "general_file": Option("text to measure forgetting on", path="file"),
        "general_length": Option("tokens of a window"),
        "held_out": Option("the run's own rows, or not", values=TRUTH),
        "models": Option("which models", many=True, values=MODELS),
        "limit": Option("items of each task, or a share"),
        "batch_size": Option("rows at once"),
        "output_dir": Option("where results go", path="directory"),
        **LOADING,
    },
    MODEL_OR_RUN,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora eval`."""
    given = Given("eval", arguments, SYNTAX.options)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars, before it is imported
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    from fedlora.commands.eval.assessment import assess
    from fedlora.commands.eval.request import Options

    include = given.text("include_path")
    timeout = given.text("judge_timeout") or "120"
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"--judge_timeout: {timeout!r}: expected a number of seconds")
    from pathlib import Path

    options = Options(
        given.loading(given.listed("models")),
        tasks=given.listed("tasks"),
        num_fewshot=given.whole("num_fewshot", 0),
        limit=given.limit(),
        batch_size=given.whole("batch_size"),
        include_path=Path(include) if include else None,
        apply_chat_template=given.flag("apply_chat_template"),
        mmlu_file=given.file("mmlu_file"),
        mmlu_dev_file=given.file("mmlu_dev_file"),
        mt_bench_file=given.file("mt_bench_file"),
        mt_bench_references=given.file("mt_bench_references"),
        max_new_tokens=given.whole("max_new_tokens") or 1024,
        judge_url=given.text("judge_url"),
        judge_model=given.text("judge_model") or "gpt-4",
        judge_key=given.text("judge_key") or os.environ.get("OPENAI_API_KEY"),
        judge_timeout=seconds,
        judge_threads=given.whole("judge_threads") or 4,
        general_file=given.file("general_file"),
        general_length=given.whole("general_length", 2),
        held_out=given.truth("held_out"),
        output_dir=given.text("output_dir"),
    )
    assess(options, emit=emit)
    return 0
