"""The strategy for ServerApps of one's own: every rule, mixed ranks and scales, failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Message

from fedlora.engines import flower
from fedlora.engines.flower.strategy import FedLora
from fedlora.errors import InputError
from fedlora.methods import METHODS
from support.flower_clients import initial_arrays, moving_clients, product_of
from support.flower_grid import InProcessGrid

NODES = [
    {"partition-id": 0, "rank": 4, "scale": 2.0, "rows": 10},
    {"partition-id": 1, "rank": 2, "scale": 1.0, "rows": 30},
    {"partition-id": 2, "rank": 1, "scale": 0.5, "rows": 60},
]
WEIGHTS = (0.1, 0.3, 0.6)


def nodes_for(method: str) -> list[dict[str, Any]]:
    """Nodes of mixed ranks, or of one where the rule needs that."""
    same = {} if METHODS[method].mixed_ranks else {"rank": 3}
    return [{**node, **same} for node in NODES]


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_takes_and_gives_what_it_computes(method: str) -> None:
    seen: list[Message] = []
    grid = InProcessGrid(moving_clients(seen), nodes_for(method))
    strategy = FedLora(method, min_available_nodes=3)
    result = strategy.start(grid, initial_arrays(), num_rounds=3, timeout=20)
    assert len(strategy.records) == 3
    for record in strategy.records:
        assert [c.weight for c in record.clients] == pytest.approx(WEIGHTS)
    # All nodes evaluate one model, the one that the result is.
    evaluated = result.evaluate_metrics_clientapp[3]["norm"]
    if not METHODS[method].training(strategy.options).keeps:
        total = sum(float(x.norm()) for x in product_of(result.arrays).values())
        assert evaluated == pytest.approx(total, rel=1e-4)
    assert result.train_metrics_clientapp[2]["train_loss"] == pytest.approx(20 * 1 + 1.5)


def test_exact_adds_what_the_nodes_have_learnt() -> None:
    seen: list[Message] = []
    grid = InProcessGrid(moving_clients(seen), NODES)
    strategy = FedLora("exact", min_available_nodes=3)
    result = strategy.start(grid, initial_arrays(), num_rounds=2, timeout=20)
    for record in strategy.records:
        assert record.aggregation_error is not None
        assert record.aggregation_error < 1e-5
    ranks = {len(a) for key, a in result.arrays.items() if "lora_A" in key for a in [a.numpy()]}
    assert max(ranks) > 4


def test_each_node_is_sent_an_adapter_of_its_own_rank_and_scale() -> None:
    seen: list[Message] = []
    grid = InProcessGrid(moving_clients(seen), NODES)
    FedLora("exact", min_available_nodes=3, evaluates=False).start(
        grid, initial_arrays(), num_rounds=2, timeout=20
    )
    ranks = {}
    for message in seen:
        arrays = message.content.array_records["arrays"]
        ranks[message.metadata.dst_node_id] = {
            a.numpy().shape[0] for key, a in arrays.items() if "lora_A" in key
        }
    assert sorted(map(tuple, ranks.values())) == [(1,), (2,), (4,)]


def test_scale_does_not_change_the_model_that_a_node_starts_from() -> None:
    seen: list[Message] = []
    nodes = [{**node, "rank": 2, "rows": 10} for node in NODES]
    grid = InProcessGrid(moving_clients(seen), nodes)
    FedLora("fedit", min_available_nodes=3, evaluates=False).start(
        grid, initial_arrays(), num_rounds=2, timeout=20
    )
    scales = {id: c.node_config["scale"] for id, c in grid.contexts.items()}
    second = [m for m in seen if m.metadata.group_id == "2"]
    products = [
        product_of(m.content.array_records["arrays"], scales[m.metadata.dst_node_id])["one"]
        for m in second
    ]
    assert products[0].norm() > 0
    for product in products[1:]:
        torch.testing.assert_close(product, products[0])


def test_a_node_that_fails_is_left_out_of_the_round() -> None:
    seen: list[Message] = []

    def errors(message: Message) -> int | None:
        gone = message.metadata.dst_node_id == 1000 and message.metadata.group_id == "2"
        return 5 if gone and message.metadata.message_type == "train" else None

    grid = InProcessGrid(moving_clients(seen), NODES, errors=errors)
    strategy = FedLora("exact", min_available_nodes=3, evaluates=False)
    strategy.start(grid, initial_arrays(), num_rounds=3, timeout=20)
    outcomes = [[c.outcome for c in record.clients] for record in strategy.records]
    assert outcomes == [["counted"] * 3, ["failed", "counted", "counted"], ["counted"] * 3]
    assert "SuperNode is not connected" in strategy.records[1].clients[0].rejected


def test_mixed_ranks_are_refused_where_a_rule_cannot_combine_them() -> None:
    grid = InProcessGrid(moving_clients([]), NODES)
    with pytest.raises(InputError, match="needs one rank for all clients"):
        FedLora("fedit", min_available_nodes=3).start(grid, initial_arrays(), timeout=20)


def test_too_few_nodes_are_told() -> None:
    grid = InProcessGrid(moving_clients([]), NODES)
    with pytest.raises(InputError, match="3 of 4 nodes are connected"):
        FedLora(min_available_nodes=4, node_timeout=0.0).start(grid, initial_arrays())


def test_unknown_rules_and_options_are_told() -> None:
    with pytest.raises(InputError, match="unknown"):
        FedLora("exactt")
    with pytest.raises(InputError, match="no such option"):
        FedLora("fedit", start_fraction=0.5)


def test_the_package_gives_its_names_when_they_are_used() -> None:
    assert flower.FedLora is FedLora
    assert set(flower.__all__) <= set(dir(flower))
    with pytest.raises(AttributeError, match="has no attribute 'fedlora'"):
        _ = flower.fedlora
