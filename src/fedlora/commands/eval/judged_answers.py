"""Measures models on MT-bench: their answers, then a judge's grades of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.commands.eval import mt_bench
from fedlora.commands.eval.asking import PromptFormat, prompt_format_of
from fedlora.commands.eval.judge import Judge, JudgeError
from fedlora.commands.eval.measuring import Measuring
from fedlora.commands.eval.models import Models
from fedlora.commands.eval.request import Options
from fedlora.commands.eval.results import MT_BENCH


def judge_of(options: Options) -> Judge | None:
    """The judge asked for; None: answers are written and not graded."""
    if options.judge_url is None:
        return None
    return Judge(options.judge_url, options.judge_model, options.judge_key, options.judge_timeout)


def measure_mt_bench(
    measuring: Measuring,
    models: Models,
    questions: Sequence[mt_bench.Question],
    judge: Judge | None,
) -> JudgeError | None:
    """Write the answers of every model, then have the judge grade one model after another.

    Returns:
        Why the judge stopped before all was graded, or None.
    """
    names = measuring.models_elsewhere
    own_template = measuring.options.loading.chat_template_path is not None
    prompt_format = prompt_format_of(measuring.subject, models.tokenizer, own_template)
    benchmark = _Benchmark(measuring, models, questions, prompt_format)
    answers = {name: benchmark.answers(name) for name in names}
    if judge is None:
        measuring.say(
            "MT-bench stops after the answers: no judge. --judge_url URL --judge_model NAME "
            "(and OPENAI_API_KEY) grades them"
        )
        return None
    for name in names:
        problem = benchmark.grade(name, answers[name], judge)
        if problem:
            return problem
    return None


@dataclass(frozen=True)
class _Benchmark:
    """MT-bench's questions to the models of one call, all in one form of prompt."""

    measuring: Measuring
    models: Models
    questions: Sequence[mt_bench.Question]
    prompt_format: PromptFormat

    def answers(self, name: str) -> dict[str, list[str]]:
        """Question -> a model's answers; each is kept on disk as it comes."""
        measuring, models = self.measuring, self.models
        path = measuring.results.directory_of(name) / "mt_bench.answers.jsonl"
        sentence = f"{name}: answers to {len(self.questions)} questions of MT-bench"
        with measuring.saying(sentence), models.using(name) as model:
            answers, cuts = mt_bench.answered(
                self.questions,
                path,
                model,
                models.tokenizer,
                self.prompt_format,
                identity=measuring.subject.fingerprint(name),
                max_new_tokens=measuring.options.max_new_tokens,
                context=models.context,
                batch_size=measuring.batch_size,
            )
        measuring.say(f"{name}: answers by {self.prompt_format.name}: {path}")
        if cuts:
            measuring.say(
                f"{name}: {cuts} prompts did not fit into the context of {models.context} "
                "tokens and lost their beginning"
            )
        return answers

    def grade(
        self, name: str, answers: Mapping[str, Sequence[str]], judge: Judge
    ) -> JudgeError | None:
        """Have a model's answers graded; scores are recorded once every answer has been judged."""
        measuring, options = self.measuring, self.measuring.options
        turns = sum(len(question.turns) for question in self.questions)
        path = measuring.results.directory_of(name) / "mt_bench.judgements.jsonl"
        with measuring.saying(f"{name}: {judge.model} judges {turns} answers"):
            grades, problem = mt_bench.judged(
                self.questions, answers, path, judge, threads=options.judge_threads
            )
        scores = mt_bench.scores(grades, turns)
        if scores and not problem:
            settings = measuring.settings(
                self.models,
                file=str(options.mt_bench_file),
                judge=judge.model,
                judge_url=judge.url,
                form=self.prompt_format.name,
                max_new_tokens=options.max_new_tokens,
                references=sum(bool(question.references) for question in self.questions),
            )
            measuring.results.record(MT_BENCH, name, scores, settings)
        unrated = sum(grade.rating is None for grade in grades)
        if unrated:
            measuring.say(
                f"{name}: {unrated} judgements have no [[rating]] and do not count; the same "
                "command asks for them again"
            )
        if problem:
            measuring.say(f"{name}: {len(grades)} of {turns} answers are judged: {path}")
        return problem
