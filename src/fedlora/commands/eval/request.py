"""Says what `fedlora eval` is asked to measure, and refuses what does not go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.subject import Subject
from fedlora.errors import InputError


@dataclass(frozen=True)
class Options:
    """What `fedlora eval` is asked for.

    Args:
        loading: what to load and how.
        tasks: of the harness.
        num_fewshot: worked examples of the tasks and of MMLU; None: the task's own number.
        limit: items of each task, subject, or set of rows; below 1 a share.
        batch_size: rows at once; None: the run's per_device_eval_batch_size, or 8.
        include_path: a directory with task files of the user's own.
        apply_chat_template: put the harness's requests as chats.
        mmlu_file: questions.
        mmlu_dev_file: where MMLU's worked examples are taken from.
        mt_bench_file, mt_bench_references: questions, and reference answers.
        max_new_tokens: of an answer of MT-bench.
        judge_url, judge_model, judge_key, judge_timeout, judge_threads: the judge's endpoint.
        general_file: general text, to measure forgetting.
        general_length: tokens of its windows; None: the model's context, 1024 at most.
        held_out: the run's own rows; None: where nothing else is asked for but general text.
        output_dir: where results go instead.
    """

    loading: Loading
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False
    mmlu_file: Path | None = None
    mmlu_dev_file: Path | None = None
    mt_bench_file: Path | None = None
    mt_bench_references: Path | None = None
    max_new_tokens: int = 1024
    judge_url: str | None = None
    judge_model: str = "gpt-4"
    judge_key: str | None = None
    judge_timeout: float = 120.0
    judge_threads: int = 4
    general_file: Path | None = None
    general_length: int | None = None
    held_out: bool | None = None
    output_dir: str | None = None

    @property
    def own_rows(self) -> bool:
        """Whether the run's own rows are evaluated."""
        if self.held_out is not None:
            return self.held_out
        return not (self.tasks or self.mmlu_file or self.mt_bench_file)


def check(subject: Subject, options: Options) -> None:
    """Refuse what cannot be done, before anything is loaded.

    Raises:
        InputError: what does not go together, and what to do.
    """
    measures = {
        "--tasks": options.tasks,
        "--mmlu_file": options.mmlu_file,
        "--mt_bench_file": options.mt_bench_file,
        "--general_file": options.general_file,
    }
    if subject.classifies:
        for key, value in measures.items():
            if value:
                raise InputError(
                    f"{key}: {subject.name} is a classifier and writes no text; fedlora eval "
                    "without it evaluates a run's classifier on its held-out rows"
                )
    if not subject.of_a_run and options.held_out:
        raise InputError(f"--held_out: {subject.name} is no run, and has no rows of its own")
    if not subject.of_a_run and not any(measures.values()):
        raise InputError(
            f"{subject.name} is no run, so it has no held-out rows of its own; say what to "
            "measure: " + ", ".join(measures)
        )
    if subject.of_a_run and options.own_rows and subject.config.trains_at_sites:
        _check_rows_here(subject)
    if options.mmlu_dev_file and not options.mmlu_file:
        raise InputError("--mmlu_dev_file belongs to --mmlu_file")
    if options.num_fewshot and not options.mmlu_dev_file:
        if options.mmlu_file:
            raise InputError(
                "--num_fewshot: MMLU from a file takes its worked examples from --mmlu_dev_file; "
                "give it, or ask for tasks and MMLU in two commands"
            )
        if not options.tasks:
            raise InputError("--num_fewshot belongs to --tasks, or --mmlu_file with a dev file")
    if options.judge_url and not options.mt_bench_file:
        raise InputError("--judge_url: give the questions to judge: --mt_bench_file")
    if options.mt_bench_references and not options.mt_bench_file:
        raise InputError("--mt_bench_references belongs to --mt_bench_file")


def _check_rows_here(subject: Subject) -> None:
    """Refuse to evaluate on rows that lie at sites."""
    if not subject.config.eval_file:
        raise InputError(
            f"{subject.name}: the rows of this run lie at its sites, which have evaluated every "
            "round; ask for something else, such as --general_file or --tasks"
        )
