"""Measures models on MMLU from a file and on tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedlora.commands.eval import mmlu
from fedlora.commands.eval.harness import Harness, task_scores
from fedlora.commands.eval.measuring import Measuring
from fedlora.commands.eval.models import Models
from fedlora.commands.eval.results import MMLU, TASK


def measure_mmlu(
    measuring: Measuring, models: Models, items: list[mmlu.Item], dev: list[mmlu.Item]
) -> None:
    """Put MMLU's questions to every model, and keep each question with the model's guess.

    Args:
        measuring: what all measures share.
        models: the models asked for.
        items: the questions.
        dev: questions that worked examples are taken from; none: no examples.
    """
    options = measuring.options
    number = 5 if options.num_fewshot is None else options.num_fewshot
    examples = mmlu.shots(dev, number)
    settings = measuring.settings(
        models,
        file=str(options.mmlu_file),
        num_fewshot=number if dev else 0,
        limit=options.limit,
    )
    for name in measuring.models_elsewhere:
        with (
            measuring.saying(f"{name}: {len(items)} questions of MMLU"),
            models.using(name) as model,
        ):
            likelihoods = mmlu.log_likelihoods(
                model,
                models.tokenizer,
                items,
                batch_size=measuring.batch_size,
                context=models.context,
                examples=examples,
            )
        answered = (
            {**asdict(item), "log_likelihoods": of_item, "guess": mmlu.guess(of_item)}
            for item, of_item in zip(items, likelihoods, strict=True)
        )
        scores = mmlu.scores(items, likelihoods)
        measuring.results.record(MMLU, name, scores, settings, answered)


def measure_tasks(measuring: Measuring, models: Models, harness: Harness) -> None:
    """Run the harness's tasks on every model, each with the samples that it keeps."""
    options = measuring.options
    for name in measuring.models_elsewhere:
        with (
            measuring.saying(f"{name}: {' '.join(harness.names)}", bars=True),
            models.using(name) as model,
        ):
            output = harness.run(
                model,
                models.tokenizer,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=measuring.batch_size,
                context=models.context,
                apply_chat_template=options.apply_chat_template,
            )
        for task, scores in task_scores(output).items():
            settings = measuring.settings(
                models,
                num_fewshot=(output.get("n-shot") or {}).get(task),
                limit=options.limit,
                version=(output.get("versions") or {}).get(task),
                apply_chat_template=options.apply_chat_template,
            )
            samples: Sequence[Any] | None = (output.get("samples") or {}).get(task)
            measuring.results.record(f"{TASK}{task}", name, scores, settings, samples)
