"""Activations of many sites at chosen tokens, from one pass over the prompts that ends at the last layer asked for.

What is asked for is picked out, or averaged, while a layer's activations pass by: whole activations are held of no more
than the layer that is being computed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mechinterp_cli.engine.capture import TOKENS_PER_PASS
from mechinterp_cli.engine.early import forward_until, forward_up_to
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.engine.wavefront import check_finite
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.kinds import HEAD_KINDS

CPU_TOKENS_PER_PASS = 1024
"""Larger passes are slower on a CPU: what a layer works on no longer stays in its caches."""
NUMBERS_AT_ONCE = 2**22
"""Of activations that are averaged at once, which takes them in float64."""


@dataclass(frozen=True)
class View:
    """Which tokens stand for each example, under one name.

    Args:
        name: Such as `last` or `span target`.
        prompts: Of every example its prompt.
        positions: Of every example the token positions whose activations are averaged; of one, it is what stands there.
    """

    name: str
    prompts: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.prompts)


Asked = Mapping[Site, Sequence[View]]
"""Sites to the views that are asked for there; views of one name are the same at all sites."""
Key = tuple[Site, str]
"""A site and the name of a view."""


def feature_shape(anatomy: Anatomy, site: Site) -> tuple[int, ...]:
    """Features per token at a site with one vector per token: (heads, size) or (features,)."""
    layer = anatomy.layers[site.layer]
    units = layer.features(site.kind, anatomy.d_model)
    if site.kind in HEAD_KINDS:
        assert layer.heads is not None
        return units, layer.heads.d_head if site.kind in ("q", "k") else layer.heads.d_value
    return (units,)


def row_shapes(anatomy: Anatomy, asked: Asked) -> dict[Key, tuple[int, ...]]:
    """What `gather` gives: (examples, features) of each site and view, or (examples, heads, size)."""
    return {
        (site, view.name): (len(view), *feature_shape(anatomy, site)) for site, views in asked.items() for view in views
    }


def views_by_name(asked: Asked) -> dict[str, View]:
    """Every view that is asked for anywhere."""
    views: dict[str, View] = {}
    for found in asked.values():
        for view in found:
            assert views.setdefault(view.name, view) == view, f"two views are called {view.name}"
    return views


@torch.no_grad()
def gather(
    model: nn.Module,
    anatomy: Anatomy,
    tokens: Sequence[Sequence[int]],
    asked: Asked,
    *,
    into: Mapping[Key, Tensor] | None = None,
    tokens_per_pass: int | None = None,
    finite: bool = True,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Mapping[Key, Tensor]:
    """Activations at every site and view, float32 on the CPU, shaped as `row_shapes` says.

    Prompts go through the model in passes of one exact length, never padded; prompts of which nothing is asked do not.
    Each pass ends after the last layer asked for, before it where only what enters it is. Means are taken in float64.
    How prompts are shared out over passes changes no more than float32 rounding.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids of every prompt.
        asked: Where, and of which tokens; not `scores` or `pattern`.
        into: Tensors to write to, where they are not to be new ones.
        tokens_per_pass: How many tokens a pass may have, if not what suits the device; one prompt is always taken.
        finite: Whether NaN and infinity are an error.
        tick: Called after each pass with the prompts that are done, and with how many there are.

    Raises:
        RunError: NaN or infinity; names the layer.
    """
    shapes = row_shapes(anatomy, asked)
    rows = {key: torch.empty(shape) for key, shape in shapes.items()} if into is None else into
    assert all(rows[key].shape == shape for key, shape in shapes.items())
    if not asked:
        return rows
    views = {name: _ByPrompt.of(view) for name, view in views_by_name(asked).items()}
    limit = tokens_per_pass or (TOKENS_PER_PASS if device_of(model).type != "cpu" else CPU_TOKENS_PER_PASS)
    passes = _passes(tokens, sorted({prompt for view in views.values() for prompt in view.examples}), limit)
    done, total = 0, sum(map(len, passes))
    for members in passes:
        reader = _Reader(asked, {name: view.chosen(members) for name, view in views.items()}, finite)
        batch = torch.tensor([tokens[i] for i in members], device=device_of(model))
        with visiting(model, anatomy, kinds_by_layer(set(asked)), reader):
            _run(model, anatomy, batch, set(asked))
        reader.write(rows)
        done += len(members)
        tick(done, total)
    return rows


def _passes(tokens: Sequence[Sequence[int]], prompts: Sequence[int], limit: int) -> list[list[int]]:
    """Prompts of each pass, shortest first."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(tokens[prompt])].append(prompt)
    out = []
    for length, members in sorted(by_length.items()):
        step = max(1, limit // length)
        out += [members[i : i + step] for i in range(0, len(members), step)]
    return out


def _run(model: nn.Module, anatomy: Anatomy, tokens: Tensor, sites: set[Site]) -> None:
    """A pass that ends as soon as every site was visited, to a layer."""
    last = max(site.layer for site in sites)
    layer = model.get_submodule(anatomy.layers[last].module)
    if {site.kind for site in sites if site.layer == last} <= {"embed", "resid_pre"}:
        forward_up_to(model, tokens, layer)
    else:
        forward_until(model, tokens, layer, lambda _: True)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Examples of one pass that average equally many tokens.

    Args:
        examples: Their places in the view.
        prompts: Their prompts' places in the pass.
        positions: Their tokens.
    """

    examples: Int[Tensor, " examples"]
    prompts: Int[Tensor, "examples 1"]
    positions: Int[Tensor, "examples tokens"]

    def rows(self, activation: Tensor) -> Tensor:
        """Float32 [examples, *features] of an activation [prompts, positions, *features], on its device."""
        count = self.positions.shape[1]
        step = max(1, NUMBERS_AT_ONCE // (count * activation[0, 0].numel()))
        chunks = zip(torch.split(self.prompts, step), torch.split(self.positions, step), strict=True)
        return torch.cat([self._chunk(activation, *at) for at in chunks])

    def _chunk(self, activation: Tensor, prompts: Tensor, positions: Tensor) -> Tensor:
        found = activation[prompts.to(activation.device), positions.to(activation.device)]
        if found.shape[1] == 1:
            return found[:, 0].float()
        return (found.sum(1, dtype=torch.float64) / found.shape[1]).float()


@dataclass(frozen=True)
class _ByPrompt:
    """A view, and the places of the examples of each prompt."""

    view: View
    examples: Mapping[int, Sequence[int]]

    @classmethod
    def of(cls, view: View) -> Self:
        examples: dict[int, list[int]] = defaultdict(list)
        for example, prompt in enumerate(view.prompts):
            examples[prompt].append(example)
        return cls(view, examples)

    def chosen(self, members: Sequence[int]) -> list[_Chosen]:
        """The examples of a pass, by how many tokens they average."""
        by_count: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for place, prompt in enumerate(members):
            for example in self.examples.get(prompt, ()):
                by_count[len(self.view.positions[example])].append((example, place))
        return [self._together(found) for found in by_count.values()]

    def _together(self, found: Sequence[tuple[int, int]]) -> _Chosen:
        examples, places = zip(*found, strict=True)
        positions = torch.tensor([self.view.positions[i] for i in examples])
        return _Chosen(torch.tensor(examples), torch.tensor(places)[:, None], positions)


class _Reader:
    """A visitor that keeps the rows asked for; they go to the CPU when the pass is over, so that no layer waits."""

    def __init__(self, asked: Asked, chosen: Mapping[str, Sequence[_Chosen]], finite: bool) -> None:
        self.asked = asked
        self.chosen = chosen
        self.finite = finite
        self.seen: dict[Site, list[tuple[str, Tensor, Tensor]]] = {}

    def __call__(self, site: Site, activation: Tensor) -> None:
        assert site not in self.seen, f"{site} was passed twice"
        self.seen[site] = list(self._rows(self.asked[site], activation))

    def _rows(self, views: Sequence[View], activation: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        for view in views:
            for chosen in self.chosen[view.name]:
                yield view.name, chosen.examples, chosen.rows(activation)

    def write(self, rows: Mapping[Key, Tensor]) -> None:
        """Put what was kept where it belongs."""
        assert self.seen.keys() == self.asked.keys(), "a site was not passed"
        for site, found in self.seen.items():
            for name, examples, part in found:
                if self.finite:
                    check_finite(part, site.layer, site.kind)
                rows[site, name][examples] = part.cpu()
