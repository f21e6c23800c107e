"""The `circuit:` section."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from mechinterp_cli.config.base import BaseConfig, MethodOptions
from mechinterp_cli.config.types import Count, Flag, Fraction, Index, Number, Seed, Text, unique

ScoreName = Literal["eap", "eap_ig_inputs", "eap_ig_activations", "clean_corrupted", "exact", "acdc", "random"]
Rank = Literal["signed", "absolute"]
Level = Literal["edges", "nodes", "neurons"]
Select = Literal["top", "greedy"]

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB (2504.13151) evaluates circuits."""
RANKS: tuple[Rank, ...] = ("signed", "absolute")
STEPPED = ("eap_ig_inputs", "eap_ig_activations")
"""Scores of several steps."""
LINEAR = ("eap", "eap_ig_inputs", "eap_ig_activations", "clean_corrupted")
"""Scores made of gradients: linear in what an edge carries."""
Share = Annotated[Number, Field(gt=0, le=1)]


def _rising(sizes: tuple[float, ...]) -> tuple[float, ...]:
    """Accept sizes in rising order.

    Raises:
        ValueError: They are not.
    """
    if list(sizes) != sorted(set(sizes)):
        raise ValueError("allowed: each larger than the one before")
    return sizes


class SplitOptions(BaseConfig):
    """Which prompts circuits are found on, and which they are evaluated on."""

    train: Fraction = 0.5
    """Share of the prompts that scores are of; whole clusters, where there are several. The others are evaluated on."""
    seed: Seed = 0
    """Of the choice."""


class RandomOptions(BaseConfig):
    """Circuits of random edges, as many as the ranking's: what any circuit of that size does."""

    draws: Index = 20
    """Random rankings; 0: none."""
    seed: Seed = 0
    """Of the rankings, and of the score `random`."""


class AcdcOptions(BaseConfig):
    """ACDC (2304.14997): edges are tried from the logits down and go where their going changes little."""

    thresholds: Annotated[tuple[Annotated[Number, Field(gt=0)], ...], Field(min_length=1), AfterValidator(_rising)] = (
        0.01,
        0.1,
        1.0,
    )
    """An edge goes where the metric's mean changes by less than this, in the metric's own unit; a circuit for each."""


class CircuitSet(BaseConfig):
    """A circuit given by hand, or read from a file; parts that are listed and the file's are one circuit."""

    heads: tuple[Text, ...] = ()
    """`9.6` is head 6 of layer 9. With `mlps`, a circuit of nodes: all edges among them, from the embedding and to the
    logits."""
    mlps: Literal["all"] | tuple[Index | Text, ...] = ()
    """Layers whose MLP is in it, beside `heads`; with `granularity: neurons` also single neurons, such as `m3.n17`."""
    edges: tuple[Text, ...] = ()
    """`embed->0.1.v`, `0.1->1.2.k`, `mlp3->logits`; a head's input is `q`, `k` or `v`. Names as EAP-IG writes them are
    read too: `a0.h1->a1.h2<k>`."""
    file: Text | None = None
    """A .json file, as this method and EAP-IG's tools write it."""

    @model_validator(mode="after")
    def _holds_something(self) -> "CircuitSet":
        if not (self.heads or self.mlps or self.edges or self.file):
            raise ValueError("a circuit that is not empty: heads, mlps, edges or a file")
        if self.edges and (self.heads or self.mlps):
            raise ValueError("edges, or heads and mlps (all edges among them), but not both")
        return self


Given = Annotated[Text, Field(description="A .json file.")] | CircuitSet


class StabilityOptions(BaseConfig):
    """Would other prompts have given the same circuit? Training prompts are drawn again, and edges ranked again."""

    draws: Count = 200
    """Bootstrap draws."""
    size: Share = 0.01
    """Share of the edges that the circuits compared have."""
    seed: Seed = 0
    """Of the draws."""


class HypothesisOptions(BaseConfig):
    """Is the circuit enough, needed, and no larger than it must be? (Wang et al. 2211.00593; Shi et al. 2410.13032)."""

    size: Share | Literal["given", "reference"] = 0.01
    """Which circuit: a share of the edges, by the first of `scores`; or the one that is given."""
    epsilon: Annotated[Number, Field(gt=0, lt=0.5)] = 0.1
    """Equivalence: how far from 1/2 the chance may be that the circuit beats the model."""
    margin: Annotated[Number, Field(gt=0)] = 0.02
    """Minimality and completeness: the smallest difference of faithfulness that matters."""
    level: Fraction = 0.05
    """Of every test."""
    permutations: Annotated[int, Field(strict=True, ge=99)] = 999
    """Independence: permutations of prompts."""
    subsets: Index = 10
    """Completeness: so many random parts of the circuit are taken out of it, and out of the model."""
    edges: Index = 50
    """Minimality: so many edges are taken out one by one, those with the smallest scores first; 0: none."""
    inflated: Index = 40
    """Minimality: so many circuits with a random path added, whose edges stand for edges that are not needed."""
    quantile: Fraction = 0.9
    """Minimality: an edge that matters more than this share of such edges is needed."""
    seed: Seed = 0
    """Of subsets, paths and permutations."""


class CircuitOptions(MethodOptions):
    """The `circuit:` section."""

    method_name: ClassVar[str] = "circuit"

    scores: Annotated[tuple[ScoreName, ...], Field(min_length=1), AfterValidator(unique)] = ("eap_ig_inputs",)
    """How edges are scored: `eap` (edge attribution patching, 2310.10348), `eap_ig_inputs` and `eap_ig_activations`
    (integrated gradients, 2403.17806), `clean_corrupted` (the mean of the gradients at both ends), `exact` (each edge
    patched: small graphs), `acdc`, `random`. Scores and circuits are of the first of `metrics`."""
    direction: Literal["noise", "denoise"] = "noise"
    """`noise`: scores are of putting corrupted activations into the clean prompt; `denoise`: the other way. A positive
    score always means that the edge helps the metric."""
    steps: Count = 5
    """Of integrated gradients."""
    granularity: Level = "edges"
    """`edges`, or `nodes`: heads and MLPs, with all edges among those that are kept; or `neurons`: heads and the single
    neurons of every MLP, where what is not kept carries its value of the corrupted prompt."""
    spans: Literal["each"] | Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(unique)] | None = None
    """Tell edges apart by position: names of spans (all else is one more, `rest`), or `each` position, which needs
    prompts of one template and length. Null: an edge is one at all positions."""
    sizes: Annotated[tuple[Share, ...], Field(min_length=1), AfterValidator(_rising)] = MIB_SIZES
    """Shares of all edges (or nodes, or heads and neurons) that circuits keep: `int(share · all)`, less what is not
    connected."""
    select: Select = "top"
    """`top`: the edges of the highest scores; `greedy`: from the logits up, each time the best edge into what is in."""
    rank: Rank = "signed"
    """By which scores the circuits are taken that are tested, drawn and written: as they are, or their size. Curves are
    of both: CPR of the signed ranking, CMD of the absolute one."""
    split: SplitOptions | None = SplitOptions()
    """Training and evaluation prompts; null: the same prompts for both."""
    random: RandomOptions = RandomOptions()
    """Random circuits beside every curve."""
    acdc: AcdcOptions = AcdcOptions()
    """For `acdc`."""
    given: Given | None = None
    """A circuit to be evaluated: a file, or heads and edges."""
    reference: Given | None = None
    """A circuit that those found are compared with; it is evaluated too."""
    tests: HypothesisOptions | None = HypothesisOptions()
    """Tests of one circuit; null: none."""
    stability: StabilityOptions | None = StabilityOptions()
    """Over resampled training prompts; null: none."""
    files: Flag = True
    """Write every circuit below size 1 as JSON, as EAP-IG's and MIB's tools read it."""
    importances: Flag = False
    """Write all scores in that form too: large (of SmolLM2 20 MB for each score)."""
