"""Whole ablations by hand: hooks on named modules and an attention written out, unit by unit, prompt by prompt."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.methods.ablate.experiment import AblateExperiment
from mechinterp_cli.methods.run import prepare
from mechinterp_cli.runs.outcome import SilentProgress
from mechinterp_cli.tasks.prompts import Prompt
from tests.families import build
from tests.models_files import write_folder
from tests.oracle import Change, Oracle, Place

Units = tuple[int, ...] | None
Stand = Callable[[Place, int], Tensor]
"""Place and prompt to what stands there, [positions, *features]."""
Spots = Mapping[int, Sequence[int]]
"""Prompt to positions."""

_NAME = re.compile(r"(?P<kind>[a-z_]*?)(?P<layer>\d+)(w(?P<window>\d+))?(\.(?P<unit>\d+|all))?(@.*)?")
_SITES = {
    "": ("z",),
    "kv": ("z",),
    "neuron": ("neuron",),
    "attention": ("attn_out",),
    "mlp": ("mlp_out",),
    "layer": ("attn_out", "mlp_out"),
    "edge": ("scores",),
}


def experiment_of(loaded: LoadedConfig) -> AblateExperiment:
    """The experiment of a config, ready to begin: for its prompts, and for what values are given to it from outside."""
    found = prepare(loaded, SilentProgress()).first
    assert isinstance(found, AblateExperiment)
    return found


def folder_of(family: str, folder: Path) -> str:
    """A tiny random model of a family, as a model folder."""
    return str(write_folder(folder / family, build(family)))


@dataclass
class ByHand:
    """A model in reach of hooks, and the prompts of an experiment.

    Args:
        oracle: The model; eager attention.
        prompts: The prompts.
        bases: Directions by name of their unit: rows of any length. Several of one site are one span.
        keys: For edges: prompt to the keys that are not seen.
        at: Prompt to the positions that are ablated; all where it is not there.
    """

    oracle: Oracle
    prompts: Sequence[Prompt]
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    keys: Spots = field(default_factory=dict)
    at: Spots = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Runs the unedited model first: what is seen must not be looked up for the first time amid a run."""
        assert self.seen

    @cached_property
    def seen(self) -> list[Mapping[Place, Tensor]]:
        """Of every prompt every activation, [positions, *features]."""
        return [self._seen(prompt.clean_tokens) for prompt in self.prompts]

    @cached_property
    def clean(self) -> list[Tensor]:
        """Of every prompt the logits of the unedited model, [positions, vocabulary]."""
        return [self.run(i, {}) for i in range(len(self.prompts))]

    def _seen(self, tokens: Sequence[int]) -> Mapping[Place, Tensor]:
        return {place: x[0] for place, x in self.oracle.run(torch.tensor([list(tokens)]))[1].items()}

    def run(self, prompt: int, changes: Mapping[Place, Change]) -> Tensor:
        """Logits [positions, vocabulary]."""
        tokens = torch.tensor([list(self.prompts[prompt].clean_tokens)])
        return self.oracle.run(tokens, changes)[0][0]

    def parts(self, name: str) -> list[tuple[str, int, Units]]:
        """What a unit of that name is: kind of site, layer, heads or neurons."""
        if name in self.bases:
            return [(*_site_of(name), None)]
        match = _NAME.fullmatch(name)
        assert match is not None, name
        layer, unit, window = int(match["layer"]), match["unit"], int(match["window"] or 1)
        layers = range(max(0, layer - window // 2), min(len(self.oracle.layers), layer + window - window // 2))
        chosen: Units = None if unit in (None, "all") else (int(unit),)
        if match["kind"] == "kv" and chosen is not None:
            config = self.oracle.config
            total = config.num_attention_heads
            share = total // getattr(config, "num_key_value_heads", total)
            chosen = tuple(range(chosen[0] * share, (chosen[0] + 1) * share))
        return [(kind, at, chosen) for at in layers for kind in _SITES[match["kind"]]]

    def ablated(self, prompt: int, names: Sequence[str], stand: Stand, *, add: bool = False) -> Tensor:
        """Logits [positions, vocabulary] of a prompt without these units.

        Args:
            prompt: Which one.
            names: Of units.
            stand: What stands in their place.
            add: Whether it is added to what is there.
        """
        changes: dict[Place, list[Change]] = defaultdict(list)
        together: dict[Place, list[Tensor]] = defaultdict(list)
        for name in names:
            if name in self.bases:
                together[_site_of(name)].append(self.bases[name])
                continue
            for kind, layer, units in self.parts(name):
                changes[kind, layer].append(self._change((kind, layer), units, prompt, stand, add))
        for place, rows in together.items():
            span = torch.cat(rows).double()
            onto = (torch.linalg.pinv(span) @ span).float()
            changes[place].append(self._change(place, None, prompt, stand, add, onto))
        return self.run(prompt, {place: _one_after_the_other(found) for place, found in changes.items()})

    def _change(
        self, place: Place, units: Units, prompt: int, stand: Stand, add: bool, onto: Tensor | None = None
    ) -> Change:
        length = len(self.prompts[prompt].clean_tokens)
        positions = list(self.at.get(prompt, range(length)))

        def change(x: Tensor) -> Tensor:
            chosen = list(range(x.shape[2])) if units is None else list(units)
            if place[0] == "scores":
                for position in positions:
                    for key in self.keys[prompt]:
                        x[:, position, chosen, key] = -torch.inf
                return x
            new = stand(place, prompt)
            for position in positions:
                if onto is not None:
                    x[:, position] = x[:, position] + (new[position] - x[:, position]) @ onto
                elif add:
                    x[:, position, chosen] = x[:, position, chosen] + new[position][chosen]
                else:
                    x[:, position, chosen] = new[position][chosen]
            return x

        return change

    # What stands in place.

    def zero(self, place: Place, prompt: int) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.seen[prompt][place])

    def mean(self, place: Place, prompt: int) -> Tensor:
        """The mean over all positions of all prompts."""
        over = torch.cat([seen[place] for seen in self.seen]).double().mean(0).float()
        return over.expand_as(self.seen[prompt][place])

    def mean_by_position(self, place: Place, prompt: int) -> Tensor:
        """The mean over the prompts of this one's template, position by position."""
        mine = self.prompts[prompt].template
        alike = [s[place] for s, p in zip(self.seen, self.prompts, strict=True) if p.template == mine]
        return torch.stack(alike).double().mean(0).float()

    def mean_of_prompt(self, place: Place, prompt: int) -> Tensor:
        """The mean over the prompt's own positions."""
        own = self.seen[prompt][place]
        return own.double().mean(0).float().expand_as(own)

    def other(self, donor: int) -> Stand:
        """The activation of another prompt."""
        return lambda place, prompt: self.seen[donor][place]


def _site_of(direction: str) -> Place:
    """The site of a direction's name: `resid_post.0`, or `file:resid_post.0` where two files have one."""
    site, _, number = direction.rpartition(":")[2].partition(".")
    return site, int(number)


def _one_after_the_other(changes: Sequence[Change]) -> Change:
    def change(x: Tensor) -> Tensor:
        for one in changes:
            x = one(x)
        return x

    return change


def answer_metrics(hand: ByHand, prompt: int, logits: Tensor) -> dict[str, float]:
    """`logit_diff` and `kl` at the last token."""
    asked, last = hand.prompts[prompt], logits[-1].double()
    clean = hand.clean[prompt][-1].double().log_softmax(-1)
    difference = last[list(asked.answer)].logsumexp(0) - last[list(asked.wrong_answer)].logsumexp(0)
    kl = (clean.exp() * (clean - last.log_softmax(-1))).sum()
    return {"logit_diff": float(difference), "kl": float(kl)}


def token_metrics(hand: ByHand, prompt: int, logits: Tensor) -> dict[str, float]:
    """`loss`, `kl`, `repeated_loss` and `first_loss`, means over positions, and `loss@i`, `kl@i`."""
    tokens = list(hand.prompts[prompt].clean_tokens)
    found: dict[str, list[float]] = {"loss": [], "kl": [], "repeated_loss": [], "first_loss": []}
    for i in range(len(tokens) - 1):
        predicted, clean = (x[i].double().log_softmax(-1) for x in (logits, hand.clean[prompt]))
        loss = -float(predicted[tokens[i + 1]])
        found["loss"].append(loss)
        found["kl"].append(float((clean.exp() * (clean - predicted)).sum()))
        if any(tokens[j : j + 2] == tokens[i : i + 2] for j in range(i)):
            found["repeated_loss"].append(loss)
        if tokens[i + 1] not in tokens[: i + 1]:
            found["first_loss"].append(loss)
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    each = {f"{name}@{i + 1}": value for name in ("loss", "kl") for i, value in enumerate(found[name])}
    return means | each


def names_in(label: str, sets: Mapping[str, Sequence[str]] | None = None, every: Sequence[str] = ()) -> list[str]:
    """The units of a trial, from its label."""
    text = label.rpartition(", ")[0]
    if text == "everything":
        return list(every)
    if text.startswith("all but "):
        kept = (sets or {})[text.removeprefix("all but ")]
        return [name for name in every if name not in kept]
    return text.rpartition(": ")[2].split("+")
