import math

import pytest
import torch
from torch import Tensor

from mechinterp_cli.methods.probe.code_length import FRACTIONS, block_ends, code_length
from mechinterp_cli.methods.probe.logistic import Tasks, fit_site


def test_a_case_by_hand_in_bits() -> None:
    # 8 samples, blocks end at 2, 4, 8: 2 samples of 1 bit each, then 2 at p = 1/2 and 1/4, then 4 at p = 7/8
    labels = [0, 1, 1, 0, 0, 1, 1, 0]
    asked = []

    def next_block(begin: int, end: int) -> Tensor:
        asked.append((begin, end))
        chances = {2: [0.5, 0.25], 4: [0.875] * 4}[begin]
        rows = torch.zeros(2, end - begin)
        for column, (label, chance) in enumerate(zip(labels[begin:end], chances, strict=True)):
            rows[label, column], rows[1 - label, column] = chance, 1 - chance
        return rows.log()

    found = code_length(labels, next_block, classes=2, fractions=(0.25, 0.5, 1.0))
    assert asked == [(2, 4), (4, 8)]
    assert found.blocks == (2, 4, 8)
    assert float(found.bits) == pytest.approx(2 + (1 + 2) + 4 * math.log2(8 / 7), rel=1e-6)
    assert found.block_bits.tolist() == pytest.approx([2.0, 3.0, 4 * math.log2(8 / 7)], rel=1e-6)
    assert float(found.compression) == pytest.approx(8 / (5 + 4 * math.log2(8 / 7)), rel=1e-6)


def test_uniform_chances_compress_nothing_and_sites_are_coded_apart() -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 2]
    sure = torch.full((3,), 0.05).index_fill(0, torch.tensor([2]), 0.9).log()

    def next_block(begin: int, end: int) -> Tensor:
        uniform = torch.full((3, end - begin), 1 / 3).log()
        return torch.stack([uniform, sure[:, None].expand(3, end - begin)])

    found = code_length(labels, next_block, classes=3)
    assert found.bits.shape == (2,)
    assert float(found.compression[0]) == pytest.approx(1.0, rel=1e-6)
    assert float(found.bits[0]) == pytest.approx(10 * math.log2(3), rel=1e-6)
    assert float(found.bits[1]) != pytest.approx(float(found.bits[0]), rel=1e-2)


@pytest.mark.parametrize(
    ("labels", "ends"),
    [
        ([0, 1] * 500, (2, 4, 8, 16, 32, 62, 125, 250, 500, 1000)),  # 1 alone holds one class
        ([0] * 100 + [1] * 900, (125, 250, 500, 1000)),
        ([0] * 999 + [1], (1000,)),
        ([0, 1, 0], (3,)),
    ],
)
def test_first_blocks_are_merged_until_every_class_occurs(labels: list[int], ends: tuple[int, ...]) -> None:
    assert block_ends(labels, 2) == ends
    assert set(labels[: ends[0]]) == {0, 1}


def test_a_last_class_at_the_very_end_is_sent_with_the_uniform_code() -> None:
    def next_block(begin: int, end: int) -> Tensor:
        raise AssertionError((begin, end))

    found = code_length([0] * 9 + [1], next_block, classes=2)
    assert (float(found.bits), float(found.compression)) == (10.0, 1.0)


def test_a_readable_label_takes_fewer_bits_than_a_random_one() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=rng, dtype=torch.float64)
    random = torch.randint(2, (300,), generator=rng)

    def bits(labels: Tensor) -> float:
        def next_block(begin: int, end: int) -> Tensor:
            train = (torch.arange(300) < begin).double()[None]
            return fit_site(x, Tasks.of(labels, train, 2), (0.1,)).log_probabilities(x)[0, 0][:, begin:end]

        return float(code_length(labels.tolist(), next_block, classes=2).bits)

    readable, unreadable = bits((x[:, 0] > 0).long()), bits(random)
    assert readable < 200 < 290 < unreadable
    assert FRACTIONS[-1] == 1.0
