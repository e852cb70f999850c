"""Takes every measure that `fedlora eval` is asked for, on every model it is asked for."""

from __future__ import annotations

import sys

from rich.console import Console

from fedlora.commands.eval import mmlu, mt_bench
from fedlora.commands.eval.benchmarks import measure_mmlu, measure_tasks
from fedlora.commands.eval.harness import Harness
from fedlora.commands.eval.judge import JudgeError
from fedlora.commands.eval.judged_answers import judge_of, measure_mt_bench
from fedlora.commands.eval.measuring import Measuring, prepare
from fedlora.commands.eval.models import load_models, tokenizer_of
from fedlora.commands.eval.options import first
from fedlora.commands.eval.request import Options, check
from fedlora.commands.eval.results import Results, open_results, show
from fedlora.commands.eval.rows import (
    general_text_of,
    measure_general,
    measure_held_out,
    own_rows_of,
)
from fedlora.commands.eval.subject import find_subject
from fedlora.commands.json_lines import Emit
from fedlora.errors import FedloraError


def assess(options: Options, console: Console | None = None, emit: Emit | None = None) -> Results:
    """Take the measures that are asked for, keep the results on disk and show them.

    Args:
        options: what is asked for.
        console: where tables go; None: to standard output.
        emit: writes lines of JSON in the place of tables.

    Returns:
        The results.

    Raises:
        InputError: what is asked for cannot be done, and what to do.
        FedloraError: the judge stopped; all else is measured and kept.
    """
    console = console or Console()
    subject = find_subject(options.loading)
    check(subject, options)
    results = open_results(subject, options.output_dir, emit)
    for note in subject.notes:
        print(f"note: {note}", file=sys.stderr)
    problem = _measure(prepare(subject, options, results, console))
    if emit:
        emit({"event": "end", "results": len(results.scores), "output_dir": str(results.directory)})
    else:
        console.print()
        show(results, options.tasks, console)
    if results.scores and not emit:
        kept_in = f"results: {results.directory}/"
        if results.logged and subject.run:
            kept_in += f", and eval lines in {subject.run / 'metrics.jsonl'}"
        console.print(kept_in, highlight=False, soft_wrap=True)
    if problem:
        raise FedloraError(
            f"{problem}. What was judged is kept; the same command goes on where it stopped"
        )
    return results


def _measure(measuring: Measuring) -> JudgeError | None:
    """Take all measures; what can be refused is refused before models are loaded.

    Returns:
        Why the judge of MT-bench stopped, or None.
    """
    subject, options = measuring.subject, measuring.options
    harness = Harness(options.tasks, options.include_path) if options.tasks else None
    items = mmlu.read_items(options.mmlu_file) if options.mmlu_file else []
    dev = mmlu.read_items(options.mmlu_dev_file) if options.mmlu_dev_file else []
    questions = (
        mt_bench.read_questions(options.mt_bench_file, options.mt_bench_references)
        if options.mt_bench_file
        else []
    )
    judge = judge_of(options)
    data, tokenizer = None, None
    if options.own_rows and subject.of_a_run:
        with measuring.saying("reading the run's rows"):
            tokenizer, data = own_rows_of(subject)
    tokenizer = tokenizer or tokenizer_of(subject)
    text = general_text_of(measuring)
    elsewhere = bool(harness or items or questions or text)
    names = [
        *(measuring.models_on_rows if data else []),
        *(measuring.models_elsewhere if elsewhere else []),
    ]
    with measuring.saying("loading"):
        labels = data.label_names if data else ()
        models = load_models(subject, list(dict.fromkeys(names)), tokenizer, labels)
    if data:
        measure_held_out(measuring, models, data)
    if text:
        measure_general(measuring, models, text)
    if items:
        measure_mmlu(measuring, models, mmlu.limited(items, options.limit), dev)
    if harness:
        measure_tasks(measuring, models, harness)
    if questions:
        return measure_mt_bench(measuring, models, first(questions, options.limit), judge)
    return None
