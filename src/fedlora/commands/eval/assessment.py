"""Takes every measure that `fedlora eval` is asked for, on every model it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.client.evaluate import evaluate
from fedlora.commands.eval import general, mmlu, mt_bench
from fedlora.commands.eval.asking import PromptFormat, prompt_format_of
from fedlora.commands.eval.harness import Harness, task_scores
from fedlora.commands.eval.judge import Judge, JudgeError
from fedlora.commands.eval.models import Models, load_models, tokenizer_of
from fedlora.commands.eval.options import Loading, first
from fedlora.commands.eval.results import (
    GENERAL,
    HELD_OUT,
    MMLU,
    MT_BENCH,
    TASK,
    Results,
    open_results,
    show,
)
from fedlora.commands.eval.subject import BASE, Subject, find_subject
from fedlora.commands.json_lines import Emit
from fedlora.data.datasets import FederatedData
from fedlora.data.general_text import windows
from fedlora.data.server_rows import load_server_rows
from fedlora.errors import FedloraError, InputError
from fedlora.runs.absolute_paths import resolve_paths
from fedlora.runs.session import tokenized


@dataclass(frozen=True)
class Options:
    """What `fedlora eval` measures.

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


def assess(options: Options, console: Console | None = None, emit: Emit | None = None) -> Results:
    """Measure, keep, show.

    Args:
        options: what to measure.
        console: where tables go.
        emit: writes JSON in their place.

    Raises:
        InputError: what is asked for cannot be done, and what to do.
        FedloraError: the judge stopped; all else is measured and kept.
    """
    console = console or Console()
    subject = find_subject(options.loading)
    _check(subject, options)
    results = open_results(subject, options.output_dir, emit)
    for note in subject.notes:
        print(f"note: {note}", file=sys.stderr)
    work = _Work(subject, options, results, console)
    problem = work.all()
    if emit:
        emit({"event": "end", "results": len(results.scores), "output_dir": str(results.where)})
    else:
        console.print()
        show(results, options.tasks, console)
    if results.scores and not emit:
        where = f"results: {results.where}/"
        if results.logged and subject.run:
            where += f", and eval lines in {subject.run / 'metrics.jsonl'}"
        console.print(where, highlight=False, soft_wrap=True)
    if problem:
        raise FedloraError(
            f"{problem}. What was judged is kept; the same command goes on where it stopped"
        )
    return results


def _check_rows_here(subject: Subject) -> None:
    if not subject.config.eval_file:
        raise InputError(
            f"{subject.name}: the rows of this run lie at its sites, which have evaluated every "
            "round; ask for something else, such as --general_file or --tasks"
        )


def _own_rows(subject: Subject) -> tuple[Any, FederatedData]:
    """The tokenizer and the rows of a run; where clients are sites, what its server evaluates."""
    config = resolve_paths(subject.config)
    if config.engine != "sites":
        _, tokenizer, data = tokenized(config)
        return tokenizer, data
    tokenizer = tokenizer_of(subject)
    return tokenizer, load_server_rows(config, tokenizer, config.label_names or ())


def _check(subject: Subject, options: Options) -> None:
    """Refuse what cannot be done before anything is loaded."""
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
    if subject.of_a_run and options.own_rows and subject.config.engine == "sites":
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


class _Work:
    """One call: what is loaded, and what is measured with it."""

    def __init__(
        self, subject: Subject, options: Options, results: Results, console: Console
    ) -> None:
        self.subject, self.options, self.results = subject, options, results
        self.console = console
        self.batch_size = options.batch_size or (
            subject.config.per_device_eval_batch_size if subject.of_a_run else 8
        )
        every = subject.models
        shared = [m for m in every if m not in subject.clients] if len(every) > 1 else every
        wanted = options.loading.models
        self.own = subject.chosen(wanted, every)  # on the run's own rows, clients too
        # A run of which nothing but clients' models is kept has only those to show.
        self.chosen = subject.chosen(wanted, shared if len(shared) > 1 else every)

    def all(self) -> JudgeError | None:
        """Everything; what can be refused is refused before models are loaded."""
        options = self.options
        harness = Harness(options.tasks, options.include_path) if options.tasks else None
        items = mmlu.read_items(options.mmlu_file) if options.mmlu_file else []
        dev = mmlu.read_items(options.mmlu_dev_file) if options.mmlu_dev_file else []
        questions = (
            mt_bench.read_questions(options.mt_bench_file, options.mt_bench_references)
            if options.mt_bench_file
            else []
        )
        judge = self._judge()
        data, tokenizer = None, None
        if options.own_rows and self.subject.of_a_run:
            with self._saying("reading the run's rows"):
                tokenizer, data = _own_rows(self.subject)
        tokenizer = tokenizer or tokenizer_of(self.subject)
        text = options.general_file or self._own_text()
        other = bool(harness or items or questions or text)
        names = [*(self.own if data else []), *(self.chosen if other else [])]
        with self._saying("loading"):
            labels = data.label_names if data else ()
            models = load_models(self.subject, list(dict.fromkeys(names)), tokenizer, labels)
        if data:
            self._held_out(models, data)
        if text:
            self._general(models, text)
        if items:
            self._mmlu(models, mmlu.limited(items, options.limit), dev)
        if harness:
            self._tasks(models, harness)
        if questions:
            return self._mt_bench(models, first(questions, options.limit), judge)
        return None

    @contextmanager
    def _saying(self, what: str, bars: bool = False) -> Iterator[None]:
        """A line while something goes on; one that stays where it draws bars of its own, or where
        there is no terminal."""
        if self.console.is_terminal and not self.console.is_dumb_terminal and not bars:
            with self.console.status(what):
                yield
        else:
            print(f"{what} ...", file=sys.stderr, flush=True)
            yield

    def _settings(self, models: Models, **others: Any) -> dict[str, Any]:
        return {"dtype": models.dtype, "batch_size": self.batch_size, **others}

    # --- measures ---

    def _held_out(self, models: Models, data: FederatedData) -> None:
        """The run's own rows, those of all clients and those of each, on every model asked for."""
        config, limit = self.subject.config, self.options.limit
        sets = {HELD_OUT: (list(first(data.eval, limit)), self.own)}
        shared = [m for m in self.own if m not in self.subject.clients]
        for client, part in enumerate(data.clients):
            if part.eval:
                name = f"client-{client}"
                who = [*shared, *(m for m in self.own if m == name)]
                sets[f"{HELD_OUT}:{name}"] = (list(first(part.eval, limit)), who)
        if not any(rows for rows, _ in sets.values()):
            raise InputError(
                f"{self.subject.name}: the run has no held-out rows (eval_file, eval_fraction, "
                "dataset_test_split or client_eval_fraction); say what to measure: --tasks, "
                "--mmlu_file, --mt_bench_file or --general_file with --held_out false"
            )
        for name, (rows, who) in sets.items():
            for model in who if rows else ():
                whose = f" of {name.partition(':')[2]}" if ":" in name else ""
                saying = f"{model}: {len(rows)} held-out rows{whose}"
                with self._saying(saying), models.using(model) as m:
                    scores = evaluate(
                        m,
                        models.tokenizer,
                        rows,
                        batch_size=self.batch_size,
                        exact_match=config.eval_exact_match is True,
                        max_new_tokens=config.generation_max_new_tokens,
                        label_names=data.label_names,
                    )
                scores = {**scores, "rows": len(rows)}
                self.results.record(name, model, scores, self._settings(models, limit=limit))

    def _own_text(self) -> Path | None:
        """The general text that the run itself was evaluated on."""
        config = self.subject.config
        wanted = self.options.own_rows and self.subject.of_a_run and not self.subject.classifies
        return Path(config.general_file) if wanted and config.general_file else None

    def _general(self, models: Models, path: Path) -> None:
        """The loss on general text, and how much more of it a model has than the base."""
        length, limit = self.options.general_length or 1024, self.options.limit
        if not self.options.general_file:  # as the run itself did
            config = self.subject.config
            length = self.options.general_length or config.max_length
            limit = config.max_eval_samples if limit is None else limit
        length = min(length, models.context)
        whole = int(limit) if limit is not None and limit >= 1 else None
        rows = windows(models.tokenizer, path, length, whole)
        if limit is not None and limit < 1:
            rows = list(first(rows, limit))
        base: general.Losses | None = None
        for model in sorted(self.chosen, key=lambda name: name != BASE):  # the base before others
            with (
                self._saying(f"{model}: {len(rows)} windows of general text"),
                models.using(model) as m,
            ):
                measured = general.measured(m, rows, self.batch_size)
            scores = dict(measured.scores)
            if model == BASE:
                base = measured
            elif base is not None:
                scores |= general.forgetting(measured, base)
            self.results.record(
                GENERAL, model, scores, self._settings(models, file=str(path), length=length)
            )

    def _mmlu(self, models: Models, items: list[mmlu.Item], dev: list[mmlu.Item]) -> None:
        """MMLU's questions on every model, each question kept with what was guessed."""
        number = 5 if self.options.num_fewshot is None else self.options.num_fewshot
        examples = mmlu.shots(dev, number)
        settings = self._settings(
            models,
            file=str(self.options.mmlu_file),
            num_fewshot=number if dev else 0,
            limit=self.options.limit,
        )
        for model in self.chosen:
            with self._saying(f"{model}: {len(items)} questions of MMLU"), models.using(model) as m:
                likelihoods = mmlu.log_likelihoods(
                    m,
                    models.tokenizer,
                    items,
                    batch_size=self.batch_size,
                    context=models.context,
                    examples=examples,
                )
            kept = (
                {**asdict(item), "log_likelihoods": x, "guess": mmlu.guess(x)}
                for item, x in zip(items, likelihoods, strict=True)
            )
            self.results.record(MMLU, model, mmlu.scores(items, likelihoods), settings, kept)

    def _tasks(self, models: Models, harness: Harness) -> None:
        """The harness's tasks on every model, each with the samples that it keeps."""
        options = self.options
        for model in self.chosen:
            with (
                self._saying(f"{model}: {' '.join(harness.names)}", bars=True),
                models.using(model) as m,
            ):
                output = harness.run(
                    m,
                    models.tokenizer,
                    num_fewshot=options.num_fewshot,
                    limit=options.limit,
                    batch_size=self.batch_size,
                    context=models.context,
                    apply_chat_template=options.apply_chat_template,
                )
            for task, scores in task_scores(output).items():
                settings = self._settings(
                    models,
                    num_fewshot=(output.get("n-shot") or {}).get(task),
                    limit=options.limit,
                    version=(output.get("versions") or {}).get(task),
                    apply_chat_template=options.apply_chat_template,
                )
                samples: Sequence[Any] | None = (output.get("samples") or {}).get(task)
                self.results.record(f"{TASK}{task}", model, scores, settings, samples)

    # --- MT-bench ---

    def _judge(self) -> Judge | None:
        options = self.options
        if options.judge_url is None:
            return None
        return Judge(
            options.judge_url, options.judge_model, options.judge_key, options.judge_timeout
        )

    def _mt_bench(
        self, models: Models, questions: Sequence[mt_bench.Question], judge: Judge | None
    ) -> JudgeError | None:
        """Answers of every model, then grades of every model while the judge answers."""
        prompt_format = prompt_format_of(
            self.subject, models.tokenizer, self.options.loading.chat_template_path is not None
        )
        answers = {
            model: self._answers(models, model, questions, prompt_format) for model in self.chosen
        }
        if judge is None:
            self._say(
                "MT-bench stops after the answers: no judge. --judge_url URL --judge_model NAME "
                "(and OPENAI_API_KEY) grades them"
            )
            return None
        for model in self.chosen:
            problem = self._grades(models, model, questions, answers[model], judge, prompt_format)
            if problem:
                return problem
        return None

    def _answers(
        self,
        models: Models,
        model: str,
        questions: Sequence[mt_bench.Question],
        prompt_format: PromptFormat,
    ) -> dict[str, list[str]]:
        """Question -> a model's answers, which are kept as they come."""
        path = self.results.place(model) / "mt_bench.answers.jsonl"
        with (
            self._saying(f"{model}: answers to {len(questions)} questions of MT-bench"),
            models.using(model) as m,
        ):
            answers, cuts = mt_bench.answered(
                questions,
                path,
                m,
                models.tokenizer,
                prompt_format,
                identity=self.subject.fingerprint(model),
                max_new_tokens=self.options.max_new_tokens,
                context=models.context,
                batch_size=self.batch_size,
            )
        self._say(f"{model}: answers by {prompt_format.name}: {path}")
        if cuts:
            self._say(
                f"{model}: {cuts} prompts did not fit into the context of {models.context} "
                "tokens and lost their beginning"
            )
        return answers

    def _grades(
        self,
        models: Models,
        model: str,
        questions: Sequence[mt_bench.Question],
        answers: Mapping[str, Sequence[str]],
        judge: Judge,
        prompt_format: PromptFormat,
    ) -> JudgeError | None:
        """A model's grades, recorded where there is one for every answer."""
        options = self.options
        wanted = sum(len(q.turns) for q in questions)
        path = self.results.place(model) / "mt_bench.judgements.jsonl"
        with self._saying(f"{model}: {judge.model} judges {wanted} answers"):
            grades, problem = mt_bench.judged(
                questions, answers, path, judge, threads=options.judge_threads
            )
        scores = mt_bench.scores(grades, wanted)
        if scores and not problem:
            settings = self._settings(
                models,
                file=str(options.mt_bench_file),
                judge=judge.model,
                judge_url=judge.url,
                form=prompt_format.name,
                max_new_tokens=options.max_new_tokens,
                references=sum(bool(q.references) for q in questions),
            )
            self.results.record(MT_BENCH, model, scores, settings)
        unrated = sum(g.rating is None for g in grades)
        if unrated:
            self._say(
                f"{model}: {unrated} judgements have no [[rating]] and do not count; the same "
                "command asks for them again"
            )
        if problem:
            self._say(f"{model}: {len(grades)} of {wanted} answers are judged: {path}")
        return problem

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
