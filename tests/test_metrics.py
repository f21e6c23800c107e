"""Metrics against plain float64 arithmetic, analytic cases, and what must not be passed over in silence."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax

from mechinterp_cli.errors import UserError
from mechinterp_cli.metric_names import ANSWER_METRICS
from mechinterp_cli.metrics import METRICS, Measurer, find_metric
from mechinterp_cli.tasks.prompts import Prompt

VOCAB = 211


def prompt(answer: Sequence[int], wrong: Sequence[int] = ()) -> Prompt:
    return Prompt("a", (1,), tuple(answer), "x", wrong_answer=tuple(wrong))


def measure(
    name: str, logits: torch.Tensor, prompts: Sequence[Prompt], reference: torch.Tensor | None = None
) -> np.ndarray:
    index = torch.arange(len(prompts)) if len(prompts) > 1 else torch.zeros(len(logits), dtype=torch.long)
    return Measurer([name], prompts, reference)(logits, index)[:, 0].numpy()


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(150, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5


@pytest.fixture
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(VOCAB) for _ in range(150)]
    return [prompt(d[: 1 + i % 4].tolist(), d[10 : 11 + i % 7].tolist()) for i, d in enumerate(drawn)]


def expected(name: str, row: np.ndarray, p: Prompt, reference: np.ndarray) -> float:
    answer, wrong = list(p.answer), list(p.wrong_answer)
    probability, clean = softmax(row), log_softmax(reference)
    return float(
        {
            "logit_diff": logsumexp(row[answer]) - logsumexp(row[wrong]),
            "prob": probability[answer].sum(),
            "prob_diff": probability[answer].sum() - probability[wrong].sum(),
            "logprob": np.log(probability[answer].sum()),
            "rank": (row > row[answer].max()).sum(),
            "kl": (np.exp(clean) * (clean - log_softmax(row))).sum(),
            "accuracy": logsumexp(row[answer]) > logsumexp(row[wrong]),
        }[name]
    )


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_against_plain_arithmetic(
    name: str, dtype: torch.dtype, tolerance: float, logits: torch.Tensor, prompts: list[Prompt]
) -> None:
    rounded = logits.to(dtype)
    reference = rounded.roll(1, 0)
    got = measure(name, rounded, prompts, reference)
    wanted = [
        expected(name, row, p, ref)
        for row, p, ref in zip(rounded.double().numpy(), prompts, reference.double().numpy(), strict=True)
    ]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def test_columns_come_in_the_order_asked_and_chunks_do_not_matter(logits: torch.Tensor, prompts: list[Prompt]) -> None:
    names = ["kl", "logit_diff", "prob", "rank"]
    measurer = Measurer(names, prompts, logits)
    index = torch.randint(0, 150, (150,), generator=torch.Generator().manual_seed(1))
    together = measurer(logits, index)
    alone = torch.cat([measurer(logits[i : i + 1], index[i : i + 1]) for i in range(150)])
    assert measurer.names == tuple(names)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    single = Measurer(["prob"], prompts)(logits, index)[:, 0]
    assert torch.equal(together[:, 2], single)


def test_analytic_values() -> None:
    row = torch.tensor([[np.log(6.0), np.log(3.0), 0.0]], dtype=torch.float64)
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    p = [prompt([0], [1])]
    assert measure("logit_diff", row, p)[0] == pytest.approx(np.log(2))
    assert measure("prob", row, p)[0] == pytest.approx(0.6)
    assert measure("prob_diff", row, p)[0] == pytest.approx(0.3)
    assert measure("prob", row, [prompt([0, 2])])[0] == pytest.approx(0.7)
    assert measure("rank", row, [prompt([2])])[0] == 2
    # A sum over the vocabulary: the mean would be a third of it.
    assert measure("kl", row, p, uniform)[0] == pytest.approx(np.log(10 / 3) - np.log(18) / 3)


def test_a_set_of_one_is_the_token_and_a_set_of_two_is_not() -> None:
    row = torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64)
    assert measure("logit_diff", row, [prompt([0], [1])])[0] == 1.0
    both = measure("logit_diff", row, [prompt([0, 2], [1])])[0]
    assert both == pytest.approx(np.logaddexp(2.0, 0.5) - 1.0)
    # Padding beside a larger set changes nothing, and the padding's token 0 is not counted.
    padded = measure("prob", row.repeat(2, 1), [prompt([1]), prompt([0, 1, 2])])
    assert padded[0] == pytest.approx(softmax(row[0].numpy())[1])
    assert padded[1] == pytest.approx(1.0)


def test_kl_to_itself_is_nothing_and_small_changes_survive_float32() -> None:
    clean = torch.randn(1, 49152, generator=torch.Generator().manual_seed(0)) * 4
    assert abs(measure("kl", clean, [prompt([0])], clean)[0]) < 1e-12
    moved = clean + 1e-3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    exact = expected("kl", moved[0].double().numpy(), prompt([0]), clean[0].double().numpy())
    assert exact < 1e-6
    assert measure("kl", moved, [prompt([0])], clean)[0] == pytest.approx(exact, abs=5e-9)


def test_forbidden_tokens_do_not_make_kl_nan() -> None:
    clean = torch.tensor([[1.0, 0.0, -torch.inf]])
    moved = torch.tensor([[0.0, 0.0, -torch.inf]])
    exact = expected("kl", moved[0, :2].double().numpy(), prompt([0]), clean[0, :2].double().numpy())
    assert measure("kl", moved, [prompt([0])], clean)[0] == pytest.approx(exact, abs=1e-6)
    lost = torch.tensor([[-torch.inf, 0.0, 0.0]])
    assert measure("kl", lost, [prompt([0])], clean)[0] == np.inf


@pytest.mark.parametrize("name", METRICS)
def test_one_nan_logit_makes_the_item_nan_and_no_other(name: str) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 200] = torch.nan
    got = measure(name, logits, [prompt([5], [6])], torch.randn(1, VOCAB))
    assert np.isnan(got).tolist() == [False, True, False]


def test_accuracy_and_rank_with_ties() -> None:
    tie = torch.tensor([[1.0, 1.0, 0.0]])
    assert measure("accuracy", tie, [prompt([0], [1])])[0] == 0
    assert measure("accuracy", tie, [prompt([0])])[0] == 0
    assert measure("accuracy", tie, [prompt([0, 1])])[0] == 1
    assert measure("rank", tie, [prompt([1])])[0] == 0
    # Against the wrong answer only, a third token on top does not count; against the vocabulary it does.
    third = torch.tensor([[1.0, 0.0, 2.0]] * 2)
    assert measure("accuracy", third, [prompt([0], [1]), prompt([0])]).tolist() == [1, 0]


def test_whole_vocabulary_accuracy_beside_padding() -> None:
    top_is_zero = torch.tensor([[3.0, 1.0, 0.0]] * 3)
    assert measure("accuracy", top_is_zero, [prompt([1]), prompt([0, 1]), prompt([0])]).tolist() == [0, 1, 1]


def test_half_precision_is_raised_before_anything_is_summed() -> None:
    logits = torch.full((1, 49152), 1.0, dtype=torch.bfloat16)
    assert measure("prob", logits, [prompt([7])])[0] == pytest.approx(1 / 49152, rel=1e-6)


def test_no_items_give_no_rows() -> None:
    assert Measurer(["prob", "rank"], [prompt([0])])(torch.empty(0, 5), torch.empty(0, dtype=torch.long)).shape == (
        0,
        2,
    )


def test_what_the_metrics_need_is_known_before_a_pass() -> None:
    assert {name for name, metric in METRICS.items() if metric.needs_wrong} == {"logit_diff", "prob_diff"}
    assert {name for name, metric in METRICS.items() if metric.needs_reference} == {"kl"}
    assert {name for name, metric in METRICS.items() if not metric.needs_answer} == {"kl"}
    assert {name for name, metric in METRICS.items() if metric.ratio_of_means_only} == {"rank", "accuracy"}
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {"rank", "kl"}
    assert all("ormalised" in (metric.function.__doc__ or "") for metric in METRICS.values())


def test_divergence_needs_no_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, other = torch.randn(2, 2, 7, generator=generator)
    index = torch.tensor([0, 1])
    asked = Measurer(["kl"], [prompt([0], [1]), prompt([2])], clean)(other, index)
    unasked = Measurer(["kl"], [prompt([]), prompt([])], clean)(other, index)
    assert torch.equal(asked, unasked)
    assert (unasked > 0.01).all()


def test_names_known_without_torch_are_those_of_the_functions() -> None:
    assert tuple(METRICS) == ANSWER_METRICS


def test_refusals_name_the_cause() -> None:
    with pytest.raises(UserError, match="'logit_dif' is not a metric") as unknown:
        find_metric("logit_dif")
    assert "logit_diff" in unknown.value.remedy
    with pytest.raises(UserError, match="logit_diff needs a wrong answer, and prompt 1 has none"):
        Measurer(["prob", "logit_diff"], [prompt([0], [1]), prompt([0])])
    with pytest.raises(UserError, match="metrics: prob needs an answer, and prompt 0 has none") as asking:
        Measurer(["kl", "prob"], [prompt([])], torch.zeros(1, 5))
    assert asking.value.remedy.startswith("Use kl, or a task with answers: ")
    with pytest.raises(ValueError, match="clean stream"):
        Measurer(["kl"], [prompt([0])])
    with pytest.raises(UserError, match="token id 9 is outside the model's vocabulary of 5 tokens"):
        Measurer(["prob"], [prompt([9])])(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long))
