"""MT-bench: answers, a judge behind a real HTTP server, and what is kept when it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.eval.judge import Judge, JudgeError
from fedlora.commands.eval.mt_bench import judged, kept
from fedlora.commands.eval.verb import verb
from fedlora.errors import FedloraError, InputError
from support.assess_mt_bench import CASES, QUESTIONS
from support.rows import write_jsonl

REFERENCES = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 2.", "It is 4."]}]}]


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback that does as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script: list[Any] = []  # a status, words, or None (no answer); then rating 7
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        step = self.server.script.pop(0) if self.server.script else "Good. Rating: [[7]]"
        if step is None:
            self.server.release.wait(10)
            return
        if isinstance(step, int):
            key = str(self.headers.get("Authorization"))
            self._send(step, {"error": {"message": f"no: {key}", "type": "x", "code": "y"}})
            return
        if isinstance(step, tuple):
            self._send(step[0], {"error": {"message": step[1], "type": "x"}})
            return
        message = {"role": "assistant", "content": step}
        self._send(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            },
        )

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The two-question file and its references, as arguments."""
    return [
        *("--mt_bench_file", str(write_jsonl(tmp_path / "question.jsonl", QUESTIONS))),
        *("--mt_bench_references", str(write_jsonl(tmp_path / "reference.jsonl", REFERENCES))),
        *("--max_new_tokens", "6"),
    ]


def asked_turns(endpoint: Endpoint) -> list[str]:
    return [body["messages"][1]["content"] for body in endpoint.asked]


def test_answers_are_judged_once(
    tiny_llama: Path,
    tmp_path: Path,
    files: list[str],
    endpoint: Endpoint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Answers alone, then judged, then again: nothing is asked twice, and no key is kept."""
    found = tmp_path / "found"
    command = [str(tiny_llama), *files, "--output_dir", str(found)]
    judge = [
        *("--judge_url", endpoint.url, "--judge_model", "the-judge"),
        *("--judge_key", "sk-very-secret"),
    ]
    assert verb(command) == 0
    assert "stops after the answers" in capsys.readouterr().out
    answers = found / "base" / "mt_bench.answers.jsonl"
    before = answers.read_bytes()
    assert [r["question_id"] for r in kept(answers)] == ["1", "2"]
    assert all(len(r["choices"][0]["turns"]) == 2 for r in kept(answers))
    endpoint.script = ["Rating: [[4]]", "Rating: [[6]]", "Rating: [[9]]", "Rating: [[5]]"]
    assert verb([*command, *judge, "--judge_threads", "1"]) == 0
    assert answers.read_bytes() == before
    record = json.loads((found / "base" / "mt_bench.json").read_text())
    assert record["scores"]["score"] == 6.0
    assert (record["scores"]["turn_1"], record["scores"]["turn_2"]) == (6.5, 5.5)
    assert record["scores"]["by_category"] == {"writing": 5.0, "math": 7.0}
    assert record["settings"]["judge"] == "the-judge"
    shown = capsys.readouterr().out
    assert "6.00" in shown
    assert "4/4" in shown
    assert len(endpoint.asked) == 4
    assert all(body["temperature"] == 0 for body in endpoint.asked)
    assert {body["model"] for body in endpoint.asked} == {"the-judge"}
    assert set(endpoint.keys) == {"Bearer sk-very-secret"}
    said = kept(answers)[1]["choices"][0]["turns"]
    last = asked_turns(endpoint)[3]
    for text in ("1+1?", "And 2 more?", "It is 2.", "It is 4.", said[0], said[1]):
        assert text in last
    assert "It is 2." not in asked_turns(endpoint)[0]
    assert verb([*command, *judge]) == 0
    assert len(endpoint.asked) == 4
    assert answers.read_bytes() == before
    for path in found.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()
    assert "secret" not in shown
    another = [x if x != "the-judge" else "another" for x in judge]
    assert verb([*command, *another]) == 0
    assert len(endpoint.asked) == 8
    assert verb([*command, "--batch_size", "1", "--limit", "1"]) == 0
    assert answers.read_bytes() == before
    assert verb([x if x != "6" else "5" for x in command]) == 0
    assert len(kept(answers)) == 4


def test_a_refused_key_is_told_and_not_shown(
    tiny_llama: Path, tmp_path: Path, files: list[str], endpoint: Endpoint
) -> None:
    """401 in the middle: what was judged stays, and the next call goes on there."""
    command = [str(tiny_llama), *files, "--output_dir", str(tmp_path / "found")]
    command += ["--judge_url", endpoint.url, "--judge_threads", "1", "--judge_key", "sk-secret"]
    endpoint.script = ["Rating: [[4]]", 401]
    with pytest.raises(FedloraError, match=r"refuses the key \(401\).*OPENAI_API_KEY") as caught:
        verb(command)
    assert "sk-secret" not in str(caught.value)
    judgements = tmp_path / "found" / "base" / "mt_bench.judgements.jsonl"
    assert [r["rating"] for r in kept(judgements)] == [4.0]
    assert not (tmp_path / "found" / "base" / "mt_bench.json").exists()
    number = len(endpoint.asked)
    assert verb(command) == 0
    assert len(endpoint.asked) == number + 3


def test_a_judgement_without_a_rating_is_asked_again(
    tiny_llama: Path,
    tmp_path: Path,
    files: list[str],
    endpoint: Endpoint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [str(tiny_llama), *files, "--output_dir", str(tmp_path / "found")]
    command += ["--judge_url", endpoint.url, "--judge_threads", "1"]
    endpoint.script = ["I cannot say."]
    assert verb(command) == 0
    shown = capsys.readouterr().out
    assert "1 judgements have no [[rating]]" in shown
    assert "3/4" in shown
    assert verb(command) == 0
    assert len(endpoint.asked) == 5
    assert "4/4" in capsys.readouterr().out


SAID = {"1": ["x", "y"], "2": ["z"]}


def fast(endpoint: Endpoint, **keys: Any) -> Judge:
    return Judge(endpoint.url, "j", "sk-secret", **{"retries": 0, **keys})


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (401, "refuses the key"),
        (403, "not permitted"),
        (404, "not found.*--judge_model"),
        (429, "too many requests or no quota"),
        (500, r"no: Bearer \*\*\*"),
    ],
)
def test_failures_keep_what_was_judged(
    tmp_path: Path, endpoint: Endpoint, status: int, wanted: str
) -> None:
    endpoint.script = ["Rating: [[3]]", status]
    path = tmp_path / "judgements.jsonl"
    grades, problem = judged(CASES, SAID, path, fast(endpoint), threads=1)
    assert isinstance(problem, JudgeError)
    with pytest.raises(JudgeError, match=wanted):
        raise problem
    assert "secret" not in str(problem)
    assert [g.rating for g in grades] == [3.0]
    assert len(endpoint.asked) == 2  # the third was not tried
    again, problem = judged(CASES, SAID, path, fast(endpoint), threads=1)
    assert problem is None
    assert sorted(g.rating for g in again if g.rating) == [3.0, 7.0, 7.0]
    assert len(endpoint.asked) == 4


def test_a_judge_that_is_busy_is_asked_again(tmp_path: Path, endpoint: Endpoint) -> None:
    """429 once: the client waits and goes on by itself."""
    endpoint.script = [429]
    grades, problem = judged(
        CASES[1:], SAID, tmp_path / "j.jsonl", fast(endpoint, retries=1), threads=1
    )
    assert problem is None
    assert [g.rating for g in grades] == [7.0]
    assert len(endpoint.asked) == 2


def test_a_judge_that_is_silent_or_gone(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script = [None]
    _, problem = judged(CASES, SAID, tmp_path / "j.jsonl", fast(endpoint, timeout=0.2), threads=1)
    assert "no answer within 0.2 s" in str(problem)
    nowhere = Judge("http://127.0.0.1:9/v1", "j", retries=0)
    _, problem = judged(CASES, SAID, tmp_path / "j.jsonl", nowhere, threads=1)
    assert "cannot be reached" in str(problem)
    with pytest.raises(InputError, match="expected http"):
        Judge("localhost:80", "j")


def test_a_judge_with_a_temperature_of_its_own(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.script = [(400, "Unsupported value: 'temperature' does not support 0")]
    grades, problem = judged(CASES, SAID, tmp_path / "j.jsonl", fast(endpoint), threads=1)
    assert problem is None
    assert len(grades) == 3
    assert ["temperature" in body for body in endpoint.asked] == [True, False, False, False]


def test_a_half_written_line_is_no_judgement(tmp_path: Path, endpoint: Endpoint) -> None:
    path = tmp_path / "j.jsonl"
    judged(CASES, SAID, path, fast(endpoint), threads=3)
    path.write_bytes(path.read_bytes()[:-20])
    grades, _ = judged(CASES, SAID, path, fast(endpoint), threads=1)
    assert len(grades) == 3
    assert len(endpoint.asked) == 4
    assert len(kept(path)) == 3
