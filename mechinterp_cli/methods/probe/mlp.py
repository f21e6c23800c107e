"""One-hidden-layer probes, all sites × folds trained together.

Each has weights and draws of its own; one batched matrix product serves them all. A part of every fold's training
samples is kept out of training and says when to stop; the test samples are never looked at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.standardise import fit_scaling


@dataclass(frozen=True)
class Training:
    """How the networks are trained (Adam).

    Args:
        hidden: Units.
        epochs: At most.
        batch: Samples per step.
        rate: Adam's learning rate.
        decay: Weight decay (AdamW).
        held_out: Share of the training samples that says when to stop.
        patience: Epochs without a lower loss on them after which a network is done.
        seed: Of initial weights, held-out samples and batches.
    """

    hidden: int = 64
    epochs: int = 200
    batch: int = 64
    rate: float = 1e-3
    decay: float = 1e-2
    held_out: float = 0.15
    patience: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Mlp:
    """Fitted networks, `relu(x scaled · first + bias) · second + bias`, of the epoch with the lowest held-out loss.

    Args:
        parameters: First weights [sites, folds, d, hidden] and biases, second weights [sites, folds, hidden, classes]
            and biases.
        mean: [sites, folds, d] of the training samples.
        scale: [sites, folds, d].
        held_out: [folds, n], 1 for training samples that only said when to stop.
        epoch: [sites, folds]: that of the networks.
        stopped: [sites, folds]: False where the loss might have gone on falling.
    """

    parameters: tuple[Tensor, ...]
    mean: Tensor
    scale: Tensor
    held_out: Tensor
    epoch: Tensor
    stopped: Tensor

    def log_probabilities(self, x: Tensor) -> Tensor:
        """[sites, folds, classes, n], nats.

        Args:
            x: [sites, n, d].
        """
        scaled = (x[:, None].to(self.mean.dtype) - self.mean[:, :, None]) / self.scale[:, :, None]
        flat = [part.flatten(0, 1) for part in self.parameters]
        logits = _forward(flat, scaled.flatten(0, 1)).view(*self.epoch.shape, x.shape[1], -1)
        return logits.log_softmax(-1).transpose(-1, -2)

    def predict(self, x: Tensor) -> Tensor:
        """Classes, [sites, folds, n]."""
        return self.log_probabilities(x).argmax(-2)


def fit_mlp(x: Tensor, labels: Tensor, train: Tensor, *, classes: int, training: Training | None = None) -> Mlp:
    """Train every site × fold; the same seed gives the same networks, whatever else is trained beside them.

    Args:
        x: [sites, n, d].
        labels: [n] from 0 on, or [folds, n].
        train: [folds, n] masks.
        classes: How many.
        training: How.
    """
    how = training or Training()
    labels, train = labels.to(x.device), train.to(x.device)
    held = held_out_samples(train, how.held_out, how.seed)
    fitted = train.to(torch.float32) - held
    scalings = [fit_scaling(site.float(), fitted) for site in x]
    mean, scale = torch.stack([one.mean for one in scalings]), torch.stack([one.scale for one in scalings])
    scaled = ((x[:, None].float() - mean[:, :, None]) / scale[:, :, None]).flatten(0, 1)
    targets = labels.expand(len(train), -1).repeat(len(x), 1)
    state = _train(scaled, targets, fitted.repeat(len(x), 1), held.repeat(len(x), 1), classes, how, len(train))
    shape = (len(x), len(train))
    parameters = tuple(part.view(*shape, *part.shape[1:]) for part in state.best)
    return Mlp(parameters, mean, scale, held, state.epoch.view(shape), state.stopped.view(shape))


def held_out_samples(train: Tensor, share: float, seed: int) -> Tensor:
    """[folds, n], 1 for a share of each fold's training samples, at least one."""
    held = torch.zeros(train.shape, dtype=torch.float32, device=train.device)
    for fold, mask in enumerate(train.cpu()):
        members = mask.nonzero().flatten()
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed + fold))
        held[fold, members[order[: max(1, round(share * len(members)))]].to(train.device)] = 1
    return held


@dataclass
class _State:
    """What is kept of the best epoch of each network."""

    best: list[Tensor]
    loss: Tensor
    epoch: Tensor
    stopped: Tensor


def _train(x: Tensor, targets: Tensor, fitted: Tensor, held: Tensor, classes: int, how: Training, folds: int) -> _State:
    parameters = _initial(len(x), folds, x.shape[-1], classes, how, x.device)
    optimiser = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=how.decay)
    number = torch.zeros(len(x), dtype=torch.long, device=x.device)
    start = [part.detach().clone() for part in parameters]
    state = _State(start, torch.full((len(x),), torch.inf, device=x.device), number, number.bool())
    draws = torch.Generator().manual_seed(how.seed)
    for epoch in range(how.epochs):
        for rows in torch.split(torch.randperm(x.shape[1], generator=draws).to(x.device), how.batch):
            loss = _loss(_forward(parameters, x[:, rows]), targets[:, rows], fitted[:, rows])
            optimiser.zero_grad()
            torch.autograd.backward(loss.sum())
            optimiser.step()
        _note(state, parameters, _held_loss(parameters, x, targets, held), epoch, how.patience)
        if bool(state.stopped.all()):
            break
    return state


def _initial(networks: int, folds: int, d: int, classes: int, how: Training, device: torch.device) -> list[Tensor]:
    """Uniform within 1/√(inputs), drawn per fold: a site's draws do not depend on how many sites there are."""
    draws = torch.Generator().manual_seed(how.seed)
    shapes = ((d, how.hidden, d), (1, how.hidden, d), (how.hidden, classes, how.hidden), (1, classes, how.hidden))
    out = []
    for rows, columns, inputs in shapes:
        drawn = (2 * torch.rand(folds, rows, columns, generator=draws) - 1) / inputs**0.5
        out.append(drawn.repeat(networks // folds, 1, 1).to(device).requires_grad_())
    return out


def _forward(parameters: list[Tensor], x: Tensor) -> Tensor:
    """[networks, n, classes]."""
    first, first_bias, second, second_bias = parameters
    hidden = torch.baddbmm(first_bias, x, first).relu()
    return torch.baddbmm(second_bias, hidden, second)


def _loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean log-loss of each network's own samples, nats, [networks]."""
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each.view_as(weights) * weights).sum(1) / weights.sum(1).clamp(min=1)


def _held_loss(parameters: list[Tensor], x: Tensor, targets: Tensor, held: Tensor) -> Tensor:
    with torch.no_grad():
        return _loss(_forward(parameters, x), targets, held)


def _note(state: _State, parameters: list[Tensor], loss: Tensor, epoch: int, patience: int) -> None:
    """Keep what is better; a network that has stopped is not looked at again."""
    better = (loss < state.loss) & ~state.stopped
    state.loss = torch.where(better, loss, state.loss)
    state.epoch = torch.where(better, epoch, state.epoch)
    for kept, now in zip(state.best, parameters, strict=True):
        kept[better] = now.detach()[better]
    state.stopped = state.stopped | (epoch - state.epoch >= patience)
