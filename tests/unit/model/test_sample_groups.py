"""Samples grouped by length, padded and unpadded; who may look at whom."""

from __future__ import annotations

import pytest
import torch

from fedlora.model.sample_groups import pad_group, samples_of, score_bar, unpad_group

LENGTHS = (7, 3, 12, 4, 11)


def test_groups_are_of_similar_length_the_longest_first() -> None:
    groups = samples_of(LENGTHS, [0, 0, 1, 1, 1]).groups
    assert [[LENGTHS[i] for i in group.samples] for group in groups] == [[12, 11], [7], [4, 3]]
    assert [(group.size, group.length) for group in groups] == [(2, 12), (1, 7), (2, 4)]
    tokens = torch.cat([group.tokens for group in groups])
    assert sorted(tokens.tolist()) == list(range(sum(LENGTHS)))


def test_padding_repeats_a_token_of_the_same_sample_and_is_taken_off_again() -> None:
    samples = samples_of(LENGTHS, [0] * 5)
    x = torch.randn(2, sum(LENGTHS), 3)
    starts = [sum(LENGTHS[:i]) for i in range(5)]
    for group in samples.groups:
        padded = pad_group(x, group).view(2, group.size, group.length, 3)
        for row, sample in enumerate(group.samples):
            begin, length = starts[sample], LENGTHS[sample]
            assert torch.equal(padded[:, row, :length], x[:, begin : begin + length])
            filling = x[:, begin : begin + 1].expand(-1, group.length - length, -1)
            assert torch.equal(padded[:, row, length:], filling)
        back = unpad_group(padded.reshape(2 * group.size, group.length, 3), group, 2)
        assert torch.equal(back, x[:, group.tokens])
        zeroed = pad_group(x, group, zero=True)
        assert float(zeroed.abs().sum()) == pytest.approx(float(back.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_bar_stands_where_a_token_may_not_look(causal: bool) -> None:
    group = samples_of([4, 3], [0, 0]).groups[0]
    bar = score_bar(group, torch.zeros(1), causal, None)
    assert bar is not None
    table = bar.expand(2, 4, 4)
    for sample, length in enumerate((4, 3)):
        for i in range(length):
            for j in range(4):
                allowed = j <= i if causal else j < length
                assert (float(table[sample, i, j]) == 0.0) == allowed
    assert torch.isfinite(torch.softmax(table, -1)).all()


def test_samples_of_one_length_that_see_everything_need_no_bar() -> None:
    group = samples_of([3, 3], [0, 0]).groups[0]
    assert group.real is None
    assert score_bar(group, torch.zeros(1), False, None) is None
    mask = torch.ones(3, 3, dtype=torch.bool).tril().triu(-1)
    bar = score_bar(group, torch.zeros(1), True, mask)
    assert bar is not None
    assert torch.equal(bar[0] == 0, mask)
