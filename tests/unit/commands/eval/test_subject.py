"""What is to be evaluated: a run, an adapter or a model, and where its parts lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.subject import find_subject, notes_on_bits
from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.safe_writing import write_directory
from support.merging import peft_saves


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory."""
    path = tmp_path_factory.mktemp("adapter") / "it"
    return peft_saves(path, tiny_llama, r=2, target_modules=["q_proj"])


def run(path: Path, tiny_llama: Path, adapter: Path, *parts: str, method: str = "exact") -> Path:
    """A run's directory with these parts."""
    path.mkdir()
    config = {"model_name_or_path": str(tiny_llama), "method": method}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    for part in parts:
        write_directory(
            path / part,
            lambda target: shutil.copytree(adapter, target, dirs_exist_ok=True) and None,
        )
    return path


def test_a_run_that_has_ended(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    path = run(tmp_path / "run", tiny_llama, adapter, "final", "round-3", "round-4")
    shutil.copytree(adapter, path / "final" / "client-10")
    shutil.copytree(adapter, path / "final" / "client-2")
    end = {"event": "end", "round": 4, "final": 3, "best": 3}
    (path / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    subject = find_subject(Loading(str(path)))
    assert subject.round == 3
    assert subject.models == ["base", "global", "client-2", "client-10"]
    assert subject.clients == ["client-2", "client-10"]
    assert subject.adapters["global"] == path / "final"
    assert find_subject(Loading(str(path), round=4)).adapters["global"] == path / "round-4"
    assert subject.chosen(("clients", "base", "client-2"), []) == ["client-2", "client-10", "base"]
    assert subject.chosen((), ["base"]) == ["base"]
    with pytest.raises(InputError, match=r"client-7: no such model of .*there are base, global"):
        subject.chosen(("client-7",), [])
    with pytest.raises(
        InputError, match=r"--round 9: .* holds no round-9 \(any more\); there are 3, 4"
    ):
        find_subject(Loading(str(path), round=9))


def test_a_run_that_goes_on_is_its_newest_whole_round(
    tiny_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    path = run(tmp_path / "run", tiny_llama, adapter, "round-1", "round-2")
    (path / "round-2" / "adapter_config.json").write_text("{}")
    subject = find_subject(Loading(str(path)))
    assert subject.round == 1
    assert "damaged" in subject.notes[0]
    assert subject.notes[1] == "the run is not complete; this is its state after round 1"
    with pytest.raises(InputError, match=r"damaged .*choose another --round"):
        find_subject(Loading(str(path), round=2))


def test_rounds_without_an_adapter_name_the_key(
    tiny_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    path = run(tmp_path / "run", tiny_llama, adapter)
    with pytest.raises(InputError, match="the run has no whole round yet; wait for the first one"):
        find_subject(Loading(str(path)))
    (path / "round-1" / "state").mkdir(parents=True)
    with pytest.raises(InputError, match="no round holds an adapter yet; save_adapter_rounds"):
        find_subject(Loading(str(path)))


def test_a_run_beside_a_quantised_base_says_so(
    tiny_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    path = run(tmp_path / "run", tiny_llama, adapter, "final")
    config = {"model_name_or_path": str(tiny_llama), "num_clients": 2, "load_in_4bit": True}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    note = "trained beside the base in 4 bits; here the base is as it was saved"
    assert find_subject(Loading(str(path))).notes == (note,)
    assert find_subject(Loading(str(path / "final"))).notes == (note,)


def test_bits_of_single_clients_are_told_with_their_numbers() -> None:
    one = Config(num_clients=3, client_overrides={1: {"load_in_8bit": True}})
    assert notes_on_bits(one) == [
        "client 1 trained beside the base in 8 bits; here the base is as it was saved"
    ]
    assert notes_on_bits(Config(num_clients=3)) == []


def test_an_adapter_names_its_base(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    subject = find_subject(Loading(str(adapter)))
    assert subject.source.name == str(tiny_llama)
    assert subject.models == ["base", "adapter"]
    assert not subject.of_a_run
    copied = tmp_path / "a"
    shutil.copytree(adapter, copied)
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(InputError, match=r"names no base model .*; give --base"):
        find_subject(Loading(str(copied)))
    assert find_subject(Loading(str(copied), base="embedded")).source.name != str(tiny_llama)


def test_a_fingerprint_is_that_of_what_answers(adapter: Path) -> None:
    subject = find_subject(Loading(str(adapter)))
    prints = {subject.fingerprint("base"), subject.fingerprint("adapter")}
    half = find_subject(Loading(str(adapter), dtype="bfloat16"))
    assert len({*prints, half.fingerprint("base")}) == 3
    assert subject.fingerprint("adapter") == find_subject(Loading(str(adapter))).fingerprint(
        "adapter"
    )


@pytest.mark.parametrize(
    ("what", "more", "says"),
    [
        ("./absent", {}, "no such directory"),
        ("a/b/c", {}, "no such directory"),
        ("embedded", {"round": 3}, "--round: embedded is a model, and no run with rounds"),
        ("embedded", {"base": "x"}, "--base: embedded is a model itself"),
        ("empty", {}, "holds no run .*, no adapter .* and no model"),
        ("file", {}, "is a file; name a directory"),
    ],
)
def test_what_is_nothing_of_these(
    what: str, more: dict[str, object], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=says):
        find_subject(Loading(what, **more))  # type: ignore[arg-type]
