"""A run goes on with the configuration it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs.resume import as_it_began, further, refuse_complete


def began(path: Path, **keys: Any) -> Config:
    """A run's directory with the configuration of three clients."""
    path.mkdir(exist_ok=True)
    values = {"num_clients": 3, "client_ranks": [4, 4, 2], "num_rounds": 5, **keys}
    config = Config(output_dir=str(path), **values)
    (path / "config.yaml").write_text(config.to_yaml())
    return config


def test_without_a_configuration_it_is_the_saved_one(tmp_path: Path) -> None:
    saved = began(tmp_path, learning_rate=1e-3)
    assert as_it_began(tmp_path, None).flat() == saved.flat()


def test_a_directory_that_was_moved_is_its_own(tmp_path: Path) -> None:
    began(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert as_it_began(tmp_path / "new", None).output_dir == str(tmp_path / "new")


def test_automatic_keys_may_stay_open_and_reports_may_change(tmp_path: Path) -> None:
    began(tmp_path, cohort_size=2, dtype="float32")
    now = Config(num_clients=3, client_ranks=[4, 4, 2], num_rounds=5, report_to=["tensorboard"])
    resumed = as_it_began(tmp_path, now)
    assert (resumed.cohort_size, resumed.dtype) == (2, "float32")
    assert resumed.report_to == ["tensorboard"]


def test_automatic_ranks_are_those_of_the_run_and_other_settings_of_clients_are_compared(
    tmp_path: Path,
) -> None:
    micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    own = {"learning_rate": 0.5}
    began(tmp_path, client_memory="6GB", client_overrides={0: {**own, **micro}, 2: micro})
    auto = {"num_clients": 3, "client_ranks": "auto", "num_rounds": 5, "client_memory": "6GB"}
    resumed = as_it_began(tmp_path, Config(**auto, client_overrides={0: own}))
    assert resumed.client_overrides == {0: {**own, **micro}, 2: micro}
    with pytest.raises(InputError, match=r"client_overrides: .*0\.25"):
        as_it_began(tmp_path, Config(**auto, client_overrides={0: {"learning_rate": 0.25}}))
    with pytest.raises(InputError, match="client_overrides: "):
        as_it_began(tmp_path, Config(**auto))


def test_rows_are_told_anew_where_they_lie_elsewhere_from_now_on(tmp_path: Path) -> None:
    """And not where only the carrier between server and sites changes."""
    began(tmp_path, train_file="/rows/*.jsonl", client_eval_fraction=0.5)
    own = {"num_clients": 3, "client_ranks": [4, 4, 2], "num_rounds": 5}
    now = Config(**own, engine="nvflare", kit="/kit")
    resumed = as_it_began(tmp_path, now)
    assert (resumed.train_file, resumed.engine, resumed.kit) == (None, "nvflare", "/kit")
    (tmp_path / "config.yaml").write_text(resumed.to_yaml())
    sites = {"engine": "sites", "sites": {"a": "/a"}}
    assert as_it_began(tmp_path, Config(**own, **sites)).engine == "sites"
    with pytest.raises(InputError, match=r"client_eval_fraction: 0\.0 when it began, 0\.5 now"):
        as_it_began(tmp_path, Config(**own, **sites, client_eval_fraction=0.5))


def test_other_values_are_listed_key_by_key(tmp_path: Path) -> None:
    began(tmp_path)
    now = Config(num_clients=3, client_ranks=[4, 4, 4], num_rounds=7, learning_rate=0.5)
    with pytest.raises(InputError) as error:
        as_it_began(tmp_path, now)
    text = str(error.value)
    assert "  client_ranks: [4, 4, 2] when it began, [4, 4, 4] now" in text
    assert "  learning_rate: 0.0002 when it began, 0.5 now" in text
    assert "When it has ended: For 2 more rounds start a new run from its result" in text


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    saved = began(tmp_path)
    refuse_complete(tmp_path, None)  # it has not
    (tmp_path / "final").mkdir()
    with pytest.raises(InputError, match="nothing to resume; the run is complete") as error:
        refuse_complete(tmp_path, saved.model_copy(update={"num_rounds": 9}))
    assert f"fedlora run {tmp_path}/config.yaml --init_adapter {tmp_path}/final" in str(error.value)
    assert "--num_rounds 4" in str(error.value)


def test_what_begins_anew_is_said(tmp_path: Path) -> None:
    plain = began(tmp_path)
    assert "count from 1 again):" in further(tmp_path, plain, 2)
    both = plain.model_copy(update={"lr_scheduler_scope": "federation", "server_momentum": 0.9})
    assert "the learning rate's schedule and the server's momentum begin anew" in further(
        tmp_path, both, 2
    )
    own = plain.model_copy(update={"method": "fedsa"})
    assert "every client keeps a model of its own" in further(tmp_path, own, 2)
    assert "--num_rounds 7" in further(tmp_path, own, 2)
