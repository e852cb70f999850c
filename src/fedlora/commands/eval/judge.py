"""Asks a language model at any OpenAI-compatible endpoint to grade answers.

Single-answer grading of MT-bench (arXiv 2306.05685): the judge sees a question and the answer, and
the reference answer where there is one, and ends with `Rating: [[x]]`, x from 1 to 10. What it is
told is the public form that the benchmark's scores are defined by (single-v1, single-math-v1 and
their multi-turn forms).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.errors import FedloraError, InputError

_CONSIDER = (
    "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, "
    "creativity, and level of detail of the response."
)
_CORRECT = (
    "Your evaluation should consider correctness and helpfulness. You will be given a reference "
    "answer and the assistant's answer."
)
_EXPLAIN = "Begin your evaluation by providing a short explanation."
_COMPARE = (
    "Begin your evaluation by comparing the assistant's answer with the reference answer. Identify "
    "and correct any mistakes."
)
_RATE = (
    "Be as objective as possible. After providing your explanation, you must rate the response on "
    'a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: '
    '"Rating: [[5]]".'
)
_IMPARTIAL = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI "
    "assistant to the user question"
)
_SYSTEM = {
    "single-v1": "You are a helpful assistant.",
    "single-math-v1": "You are a helpful assistant.",
    "single-v1-multi-turn": (
        f"{_IMPARTIAL} displayed below. {_CONSIDER} You evaluation should focus on the assistant's "
        f"answer to the second user question. {_EXPLAIN} {_RATE}\n\n"
    ),
    "single-math-v1-multi-turn": (
        f"{_IMPARTIAL}. {_CORRECT} You evaluation should focus on the assistant's answer to the "
        f"second question. {_COMPARE} {_RATE}\n\n"
    ),
}
_INSTRUCTION = {
    "single-v1": f"[Instruction]\n{_IMPARTIAL} displayed below. {_CONSIDER} {_EXPLAIN} {_RATE}",
    "single-math-v1": f"[Instruction]\n{_IMPARTIAL} displayed below. {_CORRECT} {_COMPARE} {_RATE}",
}


@dataclass(frozen=True)
class Case:
    """What the judge is asked: both texts, and the name of the form."""

    form: str
    system: str
    user: str


def case(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[str] | None
) -> Case:
    """The judge's prompt on the last of these turns.

    Args:
        questions: of the user, one or two.
        answers: of the assistant, as many.
        references: reference answers, as many; None: there are none.
    """
    form = "single-math-v1" if references else "single-v1"
    if len(questions) == 1:
        reference = (
            f"[The Start of Reference Answer]\n{references[0]}\n[The End of Reference Answer]\n\n"
            if references
            else ""
        )
        text = (
            f"{_INSTRUCTION[form]}\n\n[Question]\n{questions[0]}\n\n{reference}"
            f"[The Start of Assistant's Answer]\n{answers[0]}\n[The End of Assistant's Answer]"
        )
        return Case(form, _SYSTEM[form], text)
    form += "-multi-turn"
    parts = []
    if references:
        parts.append(_talk("Reference Answer", "Reference answer", questions, references))
    parts.append(_talk("Assistant A's Conversation with User", "Assistant A", questions, answers))
    return Case(form, _SYSTEM[form], "\n\n\n".join(parts))


def _talk(title: str, speaker: str, questions: Sequence[str], answers: Sequence[str]) -> str:
    turns = "\n\n".join(
        f"### User:\n{q}\n\n### {speaker}:\n{a}" for q, a in zip(questions, answers, strict=True)
    )
    return f"<|The Start of {title}|>\n\n{turns}\n\n<|The End of {title}|>"


_RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def rating(text: str) -> float | None:
    """The first `[[x]]` of a judgement, or else `[x]`; None: it has none from 1 to 10."""
    for pattern in _RATING:
        if match := pattern.search(text):
            value = float(match.group(1))
            return value if 1 <= value <= 10 else None
    return None


class JudgeError(FedloraError):
    """The endpoint does not answer; what it answered before is kept."""


@dataclass
class Judge:
    """An OpenAI-compatible endpoint; temperature 0.

    Args:
        url: such as `http://localhost:8000/v1`.
        model: the judge's name there.
        key: the endpoint's key; it is sent, and neither written nor shown.
        timeout: seconds for one answer.
        retries: for timeouts, refused connections, 429 and 5xx, with growing pauses between.

    Raises:
        InputError: the package openai is not installed.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not re.match(r"https?://", self.url):
            raise InputError(f"--judge_url: {self.url}: expected http://... or https://...")
        try:
            import openai
        except ImportError:
            raise InputError(
                "a judge needs the package openai: pip install 'fedlora[eval]'"
            ) from None
        self._openai: Any = openai
        self._client = openai.OpenAI(
            base_url=self.url,
            api_key=self.key or "none",
            timeout=self.timeout,
            max_retries=self.retries,
        )
        self._settings: dict[str, Any] = {"temperature": 0}

    def ask(self, case: Case) -> str:
        """The judge's words.

        Raises:
            JudgeError: it does not answer, with what to do.
        """
        api = self._openai
        messages = [
            {"role": "system", "content": case.system},
            {"role": "user", "content": case.user},
        ]
        try:
            try:
                return self._words(messages)
            except api.BadRequestError as error:
                # Some models know no other temperature than their own.
                if "temperature" not in str(error) or not self._settings:
                    raise
                self._settings = {}
                return self._words(messages)
        except api.AuthenticationError:
            complaint = "refuses the key (401)" if self.key else "wants a key (401)"
            raise JudgeError(
                f"{self.url} {complaint}: give --judge_key, or better OPENAI_API_KEY in the "
                "environment"
            ) from None
        except api.PermissionDeniedError as error:
            raise JudgeError(f"{self.url}: not permitted (403): {self._said(error)}") from None
        except api.NotFoundError as error:
            raise JudgeError(
                f"{self.url}: not found (404): {self._said(error)}; check --judge_url (it ends in "
                f"/v1 with most servers) and --judge_model {self.model}"
            ) from None
        except api.RateLimitError as error:
            raise JudgeError(
                f"{self.url}: too many requests or no quota left (429): {self._said(error)}"
            ) from None
        except api.APITimeoutError:
            raise JudgeError(
                f"{self.url}: no answer within {self.timeout:g} s, {self.retries + 1} times; "
                "--judge_timeout gives more"
            ) from None
        except api.APIConnectionError as error:
            why = str(error.__cause__ or error)
            raise JudgeError(f"{self.url}: cannot be reached: {self._hidden(why)}") from None
        except api.OpenAIError as error:
            raise JudgeError(f"{self.url}: {self._said(error)}") from None

    def _words(self, messages: Any) -> str:
        completion = self._client.chat.completions.create(
            model=self.model, messages=messages, **self._settings
        )
        choices = getattr(completion, "choices", None)
        if not choices:
            raise JudgeError(f"{self.url}: the answer is no chat completion; check --judge_url")
        return str(choices[0].message.content or "")

    def _said(self, error: Any) -> str:
        body = getattr(error, "body", None)
        text = body.get("message") if isinstance(body, dict) else None
        return self._hidden(" ".join(str(text or error).split())[:200])

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text
