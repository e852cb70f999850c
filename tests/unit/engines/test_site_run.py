"""Parts of a run at a site that need no model: counts, kept factors, bounds on epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.client.trainer import train
from fedlora.config.config import Config
from fedlora.config.site import Bounds, Site
from fedlora.config.site_run import BoundError
from fedlora.data.tokenize import IGNORE
from fedlora.engines.site_run import _labels, _with_kept, load
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Dense, LowRank
from support.rows import rows, write_jsonl


def test_what_a_mean_is_over() -> None:
    tokens = [
        {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ]
    assert _labels(tokens, ()) == 3, "nothing predicts a first token"
    assert _labels(tokens, ("a", "b")) == 2


def test_a_kept_factor_takes_the_place_of_the_global_one() -> None:
    adapter = {
        "q": LowRank(torch.ones(1, 2), torch.zeros(3, 1)),
        "v": LowRank(torch.ones(1, 2), torch.zeros(3, 1)),
        "w": Dense(torch.ones(3, 2)),
    }
    own = _with_kept(adapter, {4: ClientState({"q.B": torch.full((3, 1), 5.0)})})
    q, v = own["q"], own["v"]
    assert isinstance(q, LowRank)
    assert isinstance(v, LowRank)
    assert q.B.tolist() == [[5.0]] * 3
    assert v.B.tolist() == [[0.0]] * 3
    assert own["w"] is adapter["w"]
    assert _with_kept(adapter, {}) == adapter


def test_epochs_beyond_the_bound_load_nothing(tmp_path: Path) -> None:
    """There is no model at all, so that its loading would fail in another way."""
    table = write_jsonl(tmp_path / "rows.jsonl", rows(16))
    site = Site(name="x", bounds=Bounds(max_steps=3))
    config = Config(
        model_name_or_path="/nowhere", train_file=str(table), per_device_train_batch_size=4
    )
    with pytest.raises(BoundError, match="are 4 steps on the rows of this site, which allows at"):
        load(site, config, 0, train)
