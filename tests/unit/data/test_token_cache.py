"""Tokens kept from run to run: the same as made anew, and none where they could differ."""

from __future__ import annotations

import copy
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

import fedlora
from fedlora import Config
from fedlora.data import token_cache
from fedlora.data.datasets import FederatedData, load_data
from fedlora.data.rendered import Chat, Classified
from fedlora.data.token_cache import tokens_of
from fedlora.data.tokenize import Outcome, tokenize_all
from support.rows import rows, write_jsonl

BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


MARKED = (
    "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% endfor %}"
)


TEXTS: list[Any] = [("stone>", "enots"), ("", "river"), ("a" * 60, "cut off"), ("stone>", "enots")]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """A token per character."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept, of data of any size."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(token_cache, "SMALLEST", 1)
    return tmp_path / "datasets" / "fedlora"


@pytest.fixture
def calls(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the tokenizer was called with."""
    found: list[Any] = []
    encode = type(tokenizer)._encode_plus

    def counted(self: Any, text: Any, *args: Any, **keys: Any) -> Any:
        found.append(text)
        return encode(self, text, *args, **keys)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counted)
    return found


def with_chat(tokenizer: Any, template: Any) -> Any:
    """The tokenizer with another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def of(tokenizer: Any, rendered: list[Any] | None = None, **keys: Any) -> list[Outcome]:
    """Rows as tokens."""
    keys = {"max_length": 50, "completion_only": True, "threads": 1, **keys}
    return tokens_of(TEXTS if rendered is None else rendered, tokenizer, **keys)


def files(path: Path) -> list[Path]:
    """What is kept."""
    return sorted(path.iterdir()) if path.is_dir() else []


def everything(data: FederatedData) -> tuple[Any, ...]:
    """All of it, to compare."""
    clients = [(list(part.train), list(part.eval)) for part in data.clients]
    return clients, list(data.eval), data.dropped, data.fingerprint, data.label_names, data.template


def talk(i: int) -> list[dict[str, str]]:
    """A conversation of two turns."""
    return [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]


DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "alpaca": (
        [
            {"instruction": f"Add {i}", "context": "x" * (i % 4), "response": f"{i}"}
            for i in range(20)
        ]
        + [{"instruction": "long " * 100, "context": "", "response": "cut"}],
        {"max_length": 400},
    ),
    "chat": (
        [{"messages": talk(i)} for i in range(20)]
        + [{"messages": talk(0)[:1]}, {"messages": talk(0)[:1]}],
        {},
    ),
    "prompt_completion": (
        [{"prompt": talk(i)[:1], "completion": talk(i)[1:]} for i in range(20)],
        {},
    ),
    "text": ([{"text": f"number {i} " * (i % 5 + 1)} for i in range(20)], {"max_length": 30}),
    "custom": (
        [{"a": f"question {i}", "b": f"answer {i}"} for i in range(20)],
        {"prompt_template": "Q {a} A ", "completion_template": "{b}"},
    ),
    "classification": (
        [{"text": f"number {i}" * (i > 0), "label": "odd" if i % 2 else "even"} for i in range(20)],
        {"label_column_name": "label"},
    ),
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_kept_tokens_are_those_made_anew(
    name: str, marked: bool, tokenizer: Any, kept: Path, calls: list[Any], tmp_path: Path
) -> None:
    values, settings = DATA[name]
    write_jsonl(tmp_path / "x.jsonl", values)
    write_jsonl(tmp_path / "y.jsonl", values[3:7])
    tokenizer = with_chat(tokenizer, MARKED if marked else BARE)
    settings = {"num_clients": 3, "client_eval_fraction": 0.2, "num_threads": 1, **settings}
    where = {"train_file": str(tmp_path / "x.jsonl"), "eval_file": str(tmp_path / "y.jsonl")}
    config = Config(**{**settings, **where})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "SMALLEST", 2**30)
        plain = load_data(config, tokenizer)
    assert files(kept) == []
    made = load_data(config, tokenizer)
    assert len(files(kept)) == 1
    assert calls
    calls.clear()
    found = load_data(config, tokenizer)
    assert calls == []
    assert everything(found) == everything(made) == everything(plain)
    first = found.clients[0].train[0]
    assert [list(row) for row in found.clients[0].train] == [list(first)] * len(
        found.clients[0].train
    )
    assert all(type(token) is int for token in first["input_ids"])
    # Another division of the same rows finds them too; what was dropped is counted all the same.
    other = load_data(config.model_copy(update={"num_clients": 2, "seed": 7}), tokenizer)
    assert calls == []
    assert other.dropped == plain.dropped
    assert other.fingerprint != plain.fingerprint
    assert len(files(kept)) == 1


def test_every_row_dropped_is_the_same_error_again(
    tokenizer: Any, kept: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "x.jsonl", rows(20))
    config = Config(train_file=str(tmp_path / "x.jsonl"), num_clients=2, max_length=2)
    said = []
    for _ in range(2):
        with pytest.raises(fedlora.InputError, match="all 10 rows are dropped") as error:
            load_data(config, tokenizer)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_small_data_is_not_kept(
    tokenizer: Any, kept: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(repr(row)) for row in TEXTS)
    monkeypatch.setattr(token_cache, "SMALLEST", size + 1)
    of(tokenizer)
    assert not kept.exists()
    monkeypatch.setattr(token_cache, "SMALLEST", size)
    of(tokenizer)
    assert len(files(kept)) == 1


def test_token_types_are_kept(kept: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "a": 3}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 2))
    tokenizer = BertTokenizerFast(tokenizer_object=core)
    pairs = [
        Classified(("a a", "a"), "x"),
        Classified(("a", "a b"), "y"),
        Classified(("a", ""), "x"),
    ]
    made = of(tokenizer, pairs, label_names=("x", "y"))
    assert of(tokenizer, pairs, label_names=("x", "y")) == made
    assert [list(row) for row in made] == [["input_ids", "token_type_ids", "label"]] * 3
    assert len(files(kept)) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"max_length": 51},
        {"completion_only": False},
        {"label_names": ("a", "b")},
        {"rendered": [*TEXTS[:-1], ("stone>", "enots ")]},
        {"rendered": [*TEXTS, ("", "one more")]},
        {"rendered": [("sto", "ne>enots"), *TEXTS[1:]]},
    ],
)
def test_other_rows_and_settings_have_their_own_file(
    other: dict[str, Any], tokenizer: Any, kept: Path
) -> None:
    of(tokenizer)
    found = of(tokenizer, **other)
    assert len(files(kept)) == 2
    keys = {"rendered": TEXTS, "max_length": 50, "completion_only": True, **other}
    assert found == tokenize_all(tokenizer=tokenizer, **keys)


def test_the_same_rows_in_any_order_have_one_file(
    tokenizer: Any, kept: Path, calls: list[Any]
) -> None:
    made = of(tokenizer)
    calls.clear()
    assert of(tokenizer, TEXTS[::-1]) == made[::-1]
    assert of(tokenizer, [*TEXTS, TEXTS[0]]) == [*made, made[0]]
    assert calls == []


def _new_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["stone"])


def _new_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<pad>"


def _new_normalizer(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("o", "a")


def _new_chat(tokenizer: Any) -> None:
    tokenizer.chat_template = BARE


def _new_side(tokenizer: Any) -> None:
    tokenizer.truncation_side = "left"


def _new_split(tokenizer: Any) -> None:
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize(
    "change", [_new_token, _new_end, _new_normalizer, _new_chat, _new_side, _new_split]
)
def test_another_tokenizer_has_its_own_file(change: Any, tokenizer: Any, kept: Path) -> None:
    of(tokenizer)
    other = copy.deepcopy(tokenizer)
    change(other)
    assert of(other) == tokenize_all(TEXTS, other, 50, True)
    assert len(files(kept)) == 2


def test_another_version_has_its_own_file(
    tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of(tokenizer)
    monkeypatch.setattr(token_cache, "VERSION", token_cache.VERSION + 1)
    of(tokenizer)
    assert len(files(kept)) == 2


def test_what_the_tokenizer_was_called_for_last_is_no_part_of_it(
    tokenizer: Any, kept: Path, calls: list[Any]
) -> None:
    made = of(tokenizer)
    tokenizer("a text", truncation=True, max_length=3, padding="max_length")
    calls.clear()
    assert of(tokenizer) == made
    assert calls == []


def test_a_template_that_tells_the_date_is_asked_every_day(tokenizer: Any, kept: Path) -> None:
    dated = with_chat(tokenizer, "{{ strftime_now('%d %b %Y') }}" + BARE)
    of(dated, [Chat(talk(i)) for i in range(3)], max_length=200)
    of(with_chat(tokenizer, "{{ [1, 2] | random }}" + BARE), [Chat(talk(0))], max_length=200)
    assert files(kept) == []
    of(dated)  # texts do not ask it
    assert len(files(kept)) == 1


def test_tokenizers_that_are_not_known_whole(
    tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import models, pre_tokenizers

    class Own(type(tokenizer)):  # type: ignore[misc]
        """Of code beside a model."""

    own = copy.deepcopy(tokenizer)
    own.__class__ = Own
    of(own)

    class Python:
        """Part of a tokenizer, in Python."""

        def pre_tokenize(self, text: Any) -> None:
            """Leave the text as it is."""

    custom = copy.deepcopy(tokenizer)
    custom.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Python())
    of(custom)
    chance = copy.deepcopy(tokenizer)
    vocabulary = tokenizer.get_vocab()
    chance.backend_tokenizer.model = models.BPE(vocabulary, [], dropout=0.5, unk_token="<unk>")
    of(chance)
    assert files(kept) == []
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert of(tokenizer) == [*of(tokenizer)]
    assert files(kept) == []


def test_conversations_with_what_json_cannot_hold(tokenizer: Any, kept: Path) -> None:
    of(with_chat(tokenizer, BARE), [Chat(talk(0), None, {"now": object()})])
    assert files(kept) == []


def test_caching_turned_off(tokenizer: Any, kept: Path) -> None:
    import datasets

    of(tokenizer)
    for path in files(kept):
        path.unlink()
    datasets.disable_caching()
    try:
        of(tokenizer)
    finally:
        datasets.enable_caching()
    assert files(kept) == []


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _empty(_: bytes) -> bytes:
    return b""


def _other_sum(content: bytes) -> bytes:
    arrays = load(content)
    return save({**arrays, "lengths": arrays["lengths"] + 1})


def _no_sum(content: bytes) -> bytes:
    return save({k: v for k, v in load(content).items() if k != "sha256"})


def _fewer(content: bytes) -> bytes:
    """A whole file, but of other rows."""
    arrays = token_cache._arrays(token_cache._outcomes(load(content))[:-1])
    return save({**arrays, "sha256": np.frombuffer(token_cache._checksum(arrays), np.uint8)})


@pytest.mark.parametrize("harm", [_truncated, _empty, _other_sum, _no_sum, _fewer])
def test_a_damaged_file_is_written_anew(harm: Any, tokenizer: Any, kept: Path) -> None:
    made = of(tokenizer)
    (path,) = files(kept)
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    assert of(tokenizer) == made
    assert path.read_bytes() == whole


def test_no_bit_may_be_another(tokenizer: Any, kept: Path) -> None:
    made = of(tokenizer)
    (path,) = files(kept)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert of(tokenizer) == made


def test_files_are_their_owners_alone(tokenizer: Any, kept: Path) -> None:
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    before = os.umask(0)
    try:
        of(tokenizer)
    finally:
        os.umask(before)
    (path,) = files(kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _refused(*_: Any, **__: Any) -> Any:
    raise PermissionError("read-only")


@pytest.mark.parametrize("what", ["mkdir", "chmod", "read_bytes"])
def test_what_is_refused_is_done_without(
    what: str, tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.mkdir(parents=True)
    kept.chmod(0o755)
    monkeypatch.setattr(Path, what, _refused)
    assert of(tokenizer) == of(tokenizer) == tokenize_all(TEXTS, tokenizer, 50, True)


@pytest.mark.parametrize("what", ["replace", "fdopen"])
def test_what_cannot_be_written_leaves_nothing(
    what: str, tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokenize_all(TEXTS, tokenizer, 50, True)
    monkeypatch.setattr(token_cache.tempfile, "mkstemp", _refused)
    assert of(tokenizer) == wanted
    monkeypatch.undo()
    monkeypatch.setattr(token_cache, "SMALLEST", 1)
    kept.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(token_cache, "cache_directory", lambda: kept)
    monkeypatch.setattr(token_cache.os, what, _refused)
    assert of(tokenizer) == wanted
    assert files(kept) == []


def test_a_file_in_the_way_of_the_directory(tokenizer: Any, kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text("in the way")
    assert of(tokenizer) == tokenize_all(TEXTS, tokenizer, 50, True)


def test_writers_at_the_same_time(tokenizer: Any, kept: Path) -> None:
    wanted = tokenize_all(TEXTS, tokenizer, 50, True)
    kept.mkdir(parents=True)
    path = kept / "x.safetensors"

    def both(_: int) -> list[Outcome] | None:
        token_cache._write(path, wanted)
        return token_cache._read(path, len(wanted))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both, range(64))) == [wanted] * 64
    assert files(kept) == [path]


def test_what_was_not_used_for_longest_makes_room(
    tokenizer: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path_of(length: int) -> Path:
        before = set(files(kept))
        of(tokenizer, max_length=length)
        (path,) = set(files(kept)) - before
        return path

    one, two = path_of(41), path_of(42)
    left = kept / "of-a-killed-run.tmp"
    left.write_bytes(b"x")
    for path, age in ((left, 300), (one, 200), (two, 100)):
        os.utime(path, (1e9 - age, 1e9 - age))
    of(tokenizer, max_length=41)  # used again
    limit = one.stat().st_size * 5 // 2
    monkeypatch.setattr(token_cache, "LARGEST", limit)
    three = path_of(43)
    assert files(kept) == sorted([one, three])
    # What is larger than all room is not kept at the cost of all others.
    monkeypatch.setattr(token_cache, "LARGEST", 10)
    of(tokenizer, max_length=44)
    assert files(kept) == sorted([one, three])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("completion_only", [False, True])
def test_texts_together_give_the_tokens_of_each(
    threads: int, completion_only: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedlora.data.tokenize

    values: list[Any] = [(f"{i}>" * (i % 3), "x" * (i % 7)) for i in range(40)]
    wanted = [tokenize_all([row], tokenizer, 10, completion_only)[0] for row in values]
    monkeypatch.setattr(fedlora.data.tokenize, "_BATCH", 6)
    found = tokenize_all(values, tokenizer, 10, completion_only, threads=threads)
    assert json.dumps(found) == json.dumps(wanted)
