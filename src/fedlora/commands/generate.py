"""Runs `fedlora generate`: answers of a run's models and the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.commands.eval.options import LOADING, MODEL_OR_RUN, MODELS, Given
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax
from fedlora.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.commands.eval.asking import Asker, Prompt
    from fedlora.commands.eval.models import Models
    from fedlora.commands.eval.subject import Subject

HELP = """\
fedlora generate MODEL_OR_RUN [--prompt TEXT ...] [--prompts_file F] [--key value ...] [--json]

Answers prompts with a run's global model, the base beside it. MODEL_OR_RUN is a run's directory
(finished or not), its round-N/ or final/, any PEFT directory, a model directory, a hub name, or
embedded. A prompt is put in the form the run was trained on (Alpaca's, the chat template, your
prompt_template), so give the instruction alone. Without a prompt, three of the run's held-out
rows are asked, and their references shown.

  --prompt TEXT ...      prompts
  --prompts_file F       text with a prompt on each line, or rows (JSON, JSONL, CSV, Parquet) with
                         the run's columns or one called prompt; answers there are shown beside
  --model NAME ...       global, base, client-K, clients, all, adapter (of a PEFT directory);
                         without it base and global
  --round N              a round of the run that is still there, instead of the final model
  --max_new_tokens N     longest answer (128)
  --raw                  take prompts as they are
  --output F.jsonl       keep prompts and answers
  --json                 the same lines on standard output: prompt, reference, answers by model
  --batch_size N         prompts at once (8)
  --base, --dtype, --use_cpu or --device cpu|cuda, --num_threads, --chat_template_path,
  --trust_remote_code    as with fedlora eval

Examples:
  fedlora generate out --prompt "write backwards abc>"
  fedlora generate out --prompts_file questions.txt --model base global client-3 --output said.jsonl
"""

SYNTAX = Syntax(
    {
        "prompt": Option("prompts", many=True),
        "prompts_file": Option("a prompt on each line, or rows", path="file"),
        "model": Option("which models", many=True, values=MODELS),
        "max_new_tokens": Option("longest answer"),
        "raw": Option("take prompts as they are", flag=True),
        "output": Option("where prompts and answers are kept", path="file"),
        "batch_size": Option("prompts at once"),
        **LOADING,
    },
    MODEL_OR_RUN,
)
SAMPLES = 3
"""Held-out rows asked where no prompt is given."""


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora generate`."""
    given = Given("generate", arguments, SYNTAX.options)
    from fedlora.commands.console import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from fedlora.commands.eval.asking import Asker
    from fedlora.commands.eval.models import load_models, tokenizer_of
    from fedlora.commands.eval.subject import find_subject
    from fedlora.commands.views.sentences import say

    loading = given.loading(given.listed("model"))
    texts, file = given.listed("prompt"), given.file("prompts_file")
    output, number = given.text("output"), given.whole("max_new_tokens") or 128
    batch_size, raw = given.whole("batch_size") or 8, given.flag("raw")
    subject = find_subject(loading)
    if subject.classifies:
        raise InputError(
            f"{subject.name} is a classifier and writes no text; fedlora eval measures it"
        )
    shared = [m for m in subject.models if m not in subject.clients]
    wanted = subject.chosen(loading.models, shared if len(shared) > 1 else subject.models)
    if not texts and not file and not subject.of_a_run:
        raise InputError("generate: give --prompt TEXT or --prompts_file F")
    _check_output(output)
    console, tokenizer = Console(), tokenizer_of(subject)
    prompts = _prompts(texts, file, subject, Asker(subject, tokenizer, raw))
    for note in subject.notes:
        say(console, f"note: {note}")
    models = load_models(subject, wanted, tokenizer)
    answers_of, cut = _answers(models, wanted, prompts, number, batch_size)
    records = _records(prompts, answers_of)
    if emit:
        for record in records:
            emit({"event": "answer", **record})
    else:
        _show(prompts, answers_of, console)
    if any(cut):
        console.print(
            f"{sum(cut)} of {len(cut)} prompts did not fit beside an answer into the context of "
            f"{models.context} tokens and lost their beginning",
            highlight=False,
        )
    if output:
        _write(output, records)
        say(console, f"answers: {output}")
    return 0


def _prompts(
    texts: Sequence[str], file: Path | None, subject: Subject, asker: Asker
) -> list[Prompt]:
    """Those of the command line and of the file; without any, some of the run's held-out rows."""
    from fedlora.commands.eval.asking import read_prompts

    prompts = [asker.text(text) for text in texts]
    prompts += read_prompts(file, asker) if file else []
    return prompts or _held_out(subject, asker)


def _answers(
    models: Models, wanted: Sequence[str], prompts: Sequence[Prompt], number: int, batch_size: int
) -> tuple[dict[str, list[str]], list[bool]]:
    """Each model's answers to all prompts, and which prompts lost their beginning.

    Args:
        models: that are loaded.
        wanted: their names, in the order in which they answer.
        prompts: as tokens.
        number: tokens of the longest answer.
        batch_size: prompts at once.
    """
    from fedlora.commands.eval.asking import answers

    answers_of: dict[str, list[str]] = {}
    cut: list[bool] = []
    for name in wanted:
        with models.using(name) as model:
            answers_of[name], cut = answers(
                model,
                models.tokenizer,
                [prompt.ids for prompt in prompts],
                max_new_tokens=number,
                context=models.context,
                batch_size=batch_size,
            )
    return answers_of, cut


def _held_out(subject: Subject, asker: Asker) -> list[Prompt]:
    from fedlora.data.raw_data import load_rows
    from fedlora.runs.absolute_paths import resolve_paths

    rows = load_rows(resolve_paths(subject.config)).eval[:SAMPLES]
    if not rows:
        raise InputError(
            f"generate: give --prompt TEXT or --prompts_file F; {subject.name} has no held-out "
            "rows to show"
        )
    return [asker.row(row) for row in rows]


def _show(prompts: list[Prompt], answers_of: dict[str, list[str]], console: Console) -> None:
    """Every prompt with the models' answers below each other."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for i, prompt in enumerate(prompts):
        console.print(Text(prompt.shown, style="bold"), soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, texts in answers_of.items():
            table.add_row(Text(name, style="cyan"), Text(texts[i] or "(nothing)"))
        if prompt.reference is not None:
            table.add_row(Text("reference", style="green"), Text(prompt.reference))
        console.print(Padding(table, (0, 0, 1, 2)))


def _check_output(output: str | None) -> None:
    if output and not Path(output).resolve().parent.is_dir():
        raise InputError(f"--output: {output}: there is no such directory")


def _records(prompts: list[Prompt], answers_of: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What was asked and answered, as it is kept."""
    records = []
    for i, prompt in enumerate(prompts):
        record: dict[str, Any] = {"prompt": prompt.shown}
        if prompt.reference is not None:
            record["reference"] = prompt.reference
        record["answers"] = {name: texts[i] for name, texts in answers_of.items()}
        records.append(record)
    return records


def _write(output: str, records: list[dict[str, Any]]) -> None:
    import json

    try:
        with Path(output).open("w", encoding="utf-8") as out:
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"--output: {output}: cannot be written: {error.strerror}") from None
