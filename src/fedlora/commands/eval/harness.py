"""Runs lm-evaluation-harness (the extra `eval`) on models that are loaded already."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import InputError


class Harness:
    """Tasks of the harness, found and loaded before a model is asked.

    Args:
        names: of tasks, groups (mmlu) or tags.
        include_path: a directory with task files of the user's own.

    Raises:
        InputError: the extra is not installed, a task is unknown, or its data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError(
                "--tasks needs lm-evaluation-harness: pip install 'fedlora[eval]'"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names = list(names)
        if include_path is not None and not include_path.is_dir():
            raise InputError(f"--include_path: {include_path}: no such directory")
        users_tasks = None if include_path is None else str(include_path)
        if users_tasks is not None:
            # Where the user's own tasks are enough, the harness's thousands are not read.
            self.manager = TaskManager(include_path=users_tasks, include_defaults=False)
        if users_tasks is None or not all(self.manager.match_tasks([n]) for n in self.names):
            self.manager = TaskManager(include_path=users_tasks)
        for name in self.names:
            if not self.manager.match_tasks([name]):
                raise InputError(_unknown(name, self.manager.all_tasks))
        for name in self.names:
            try:
                self.manager.load([name])
            except Exception as error:
                raise InputError(
                    f"--tasks: {name}: its data cannot be loaded: {_short(error)}; the harness "
                    "takes it from the hub, so this needs a network or a cache (HF_HOME) that was "
                    "filled with one; --include_path DIR has tasks over files of your own"
                ) from None

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_fewshot: int | None = None,
        limit: int | float | None = None,
        batch_size: int = 8,
        context: int | None = None,
        apply_chat_template: bool = False,
    ) -> dict[str, Any]:
        """What `lm_eval.simple_evaluate` returns: results, samples, configs, versions.

        Args:
            model: of transformers.
            tokenizer: the model's.
            num_fewshot: worked examples; None: the task's own number.
            limit: items of each task, or a share of them.
            batch_size: requests at once.
            context: the model's, in tokens.
            apply_chat_template: put requests as chats.

        Raises:
            InputError: the harness stops.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            wrapped = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_length=context,
            )
            output = simple_evaluate(
                model=wrapped,
                tasks=self.names,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=self.manager,
                apply_chat_template=apply_chat_template,
                bootstrap_iters=1000,
                log_samples=True,
            )
        except Exception as error:
            raise InputError(
                f"--tasks: {' '.join(self.names)}: the harness stops: {_short(error)}"
            ) from None
        assert output is not None, "one process gathers all results"
        return dict(output)


def task_scores(output: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task or group -> metric -> value, with `_stderr` beside it and the number of items.

    A metric's filter is named (`exact_match,strict-match`) where there is one.
    """
    out: dict[str, dict[str, Any]] = {}
    counts = output.get("n-samples") or {}
    for source in (output.get("groups") or {}, output["results"]):
        for task, values in source.items():
            scores = out.setdefault(task, {})
            for key, value in values.items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                metric, _, kind = key.partition(",")
                if metric in ("sample_len", "sample_count", "name"):
                    continue
                scores[metric if kind in ("", "none") else f"{metric},{kind}"] = float(value)
            if task in counts:
                scores["rows"] = int(counts[task]["effective"])
    return {task: scores for task, scores in out.items() if scores}


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    inside = [k for k in known if name.lower() in k.lower()][:5]
    both = list(dict.fromkeys([*near, *inside]))[:6]
    hint = f"; did you mean {', '.join(both)}?" if both else ""
    return f"--tasks: {name}: the harness knows no such task{hint}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
