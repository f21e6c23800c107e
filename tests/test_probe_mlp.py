from dataclasses import replace

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.logistic import Tasks, fit_site
from mechinterp_cli.methods.probe.mlp import Training, fit_mlp, held_out_samples
from tests.test_probe_logistic import folds

QUICK = Training(hidden=32, epochs=60, batch=40, rate=1e-2)


def curved(n: int = 480, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Whether two features have one sign: nothing that a line can tell."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def accuracy(predicted: Tensor, labels: Tensor, test: Tensor) -> float:
    return float((predicted == labels)[test].double().mean())


def test_it_learns_what_a_line_cannot() -> None:
    x, labels = curved()
    train = folds(len(x))
    fitted = fit_mlp(x[None], labels, train, classes=2, training=QUICK)
    linear = fit_site(x, Tasks.of(labels, train, 2), (0.1,)).predict(x)
    for fold, mask in enumerate(train.bool()):
        assert accuracy(fitted.predict(x[None])[0, fold], labels, ~mask) > 0.8
        assert accuracy(linear[fold, 0], labels, ~mask) < 0.65


def test_a_site_gets_the_same_network_alone_as_beside_others_and_a_seed_gives_it_again() -> None:
    x, labels = curved()
    train = folds(len(x))
    alone = fit_mlp(x[None], labels, train, classes=2, training=QUICK)
    beside = fit_mlp(torch.stack([x.flip(1), x]), labels, train, classes=2, training=QUICK)
    again = fit_mlp(x[None], labels, train, classes=2, training=QUICK)
    other = fit_mlp(x[None], labels, train, classes=2, training=replace(QUICK, seed=1))
    difference = (beside.log_probabilities(torch.stack([x, x]))[1] - alone.log_probabilities(x[None])[0]).abs().max()
    assert float(difference) <= 1e-3
    assert torch.equal(beside.epoch[1], alone.epoch[0])
    assert torch.equal(again.log_probabilities(x[None]), alone.log_probabilities(x[None]))
    assert not torch.allclose(other.log_probabilities(x[None]), alone.log_probabilities(x[None]), atol=1e-2)


def test_test_samples_change_neither_training_nor_the_epoch() -> None:
    x, labels = curved()
    train = folds(len(x))
    fitted = fit_mlp(x[None], labels, train, classes=2, training=QUICK)
    test = ~train.bool()[0]
    changed, flipped = x.clone(), torch.where(test, 1 - labels, labels)
    changed[test] = 50 * changed[test] + 7
    again = fit_mlp(changed[None], flipped, train, classes=2, training=QUICK)
    for kept, now in zip(fitted.parameters, again.parameters, strict=True):
        torch.testing.assert_close(now[0, 0], kept[0, 0], rtol=1e-3, atol=1e-4)
    assert int(again.epoch[0, 0]) == int(fitted.epoch[0, 0])
    assert not torch.allclose(again.parameters[0][0, 1], fitted.parameters[0][0, 1], atol=1e-2)


def test_training_stops_by_samples_that_are_kept_out_of_it() -> None:
    x, _ = curved()
    labels = torch.randint(2, (len(x),), generator=torch.Generator().manual_seed(3))
    train = folds(len(x))
    held = held_out_samples(train, 0.15, 0)
    assert held.sum(1).tolist() == [48.0] * 3
    assert bool((train.bool() | ~held.bool()).all())
    patient = replace(QUICK, epochs=200, patience=5)
    fitted = fit_mlp(x[None], labels, train, classes=2, training=patient)
    assert bool(fitted.stopped.all())
    assert int(fitted.epoch.max()) < 60
    cut = fit_mlp(x[None], labels, train, classes=2, training=replace(QUICK, epochs=2))
    assert not bool(cut.stopped.any())


def test_more_classes_and_chances_that_sum_to_one() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = x.abs()[:, :3].argmax(1)
    fitted = fit_mlp(x[None], labels, folds(200), classes=3, training=QUICK)
    chances = fitted.log_probabilities(x[None]).exp()
    assert chances.shape == (1, 3, 3, 200)
    torch.testing.assert_close(chances.sum(2), torch.ones(1, 3, 200))
    test = folds(200)[0] == 0
    assert accuracy(fitted.predict(x[None])[0, 0], labels, test) > 0.6
