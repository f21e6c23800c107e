"""Names of the metrics, for whoever must know them without torch: the config's check, and `mechinterp init`."""

from collections.abc import Iterable

from mechinterp_cli.errors import UserError

ANSWER_METRICS = ("logit_diff", "prob", "prob_diff", "logprob", "rank", "kl", "accuracy")
"""What is read from the logits at the answer position (`metrics.METRICS`)."""
TOKEN_METRICS = ("loss", "kl", "top1", "repeated_loss", "first_loss", "loss_gap")
"""What is measured of whole texts. `loss`: mean cross-entropy of the next token, nats. `kl`: mean of
Σ_vocab p_clean (log p_clean − log p), nats, a sum over the vocabulary. `top1`: share of predictions whose first choice
is the unedited model's. `repeated_loss`, `first_loss`: mean loss of predictions that repeat an earlier pair, and of
tokens that have not occurred; `loss_gap`: the first minus the second, so in-context learning makes it negative."""


def check_metric_names(names: Iterable[str]) -> None:
    """Refuse names that no method measures; which of the others it measures, a method checks.

    Raises:
        UserError: There is one.
    """
    for name in names:
        if name not in ANSWER_METRICS and name not in TOKEN_METRICS:
            raise no_metric(name)


def no_metric(name: str) -> UserError:
    """The error for a name that is none of a metric at the answer position."""
    return UserError(f"metrics: {name!r} is not a metric", f"Choose from {', '.join(sorted(ANSWER_METRICS))}.")
