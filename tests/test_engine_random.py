"""Random trials of one to three edits: packed rows and layer resume give what plain hooks give."""

from functools import cache

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.kinds import KEY_KINDS
from tests.engine_trials import LENGTH, PROMPTS, deviation, feature_shape, numbers, ops_of, run, two_streams
from tests.families import build

FAMILIES = ("llama", "gemma2", "gpt_neox", "gpt_oss")
"""Grouped queries; post-norms, soft-caps and a window; a parallel block; sinks, experts and a window."""


@cache
def family(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, find_anatomy(model)


@st.composite
def edits(draw: st.DrawFn, anatomy: Anatomy) -> Edit:
    layer = draw(st.sampled_from(anatomy.layers))
    site = Site(draw(st.sampled_from(layer.sites)), layer.index)
    op = draw(st.sampled_from(ops_of(site.kind)))
    shape = feature_shape(anatomy, site)
    units = draw(st.none() | st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=3, unique=True).map(tuple))
    shape = shape if units is None else (len(units), *shape[1:])
    keys = None
    if site.kind in KEY_KINDS and (op == "mask" or draw(st.booleans())):
        keys = draw(st.tuples(*[st.lists(st.integers(1, LENGTH - 1), max_size=3, unique=True).map(tuple)] * PROMPTS))
        shape = (shape[0], 1)
    reads = op in ("replace", "swap")
    values, offset = numbers(op, shape, draw(st.integers(0, 3)), torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return Edit(
        site,
        op,
        draw(positions(touched=op != "mask")),
        units=units,
        keys=keys,
        source=draw(st.sampled_from(["clean", "corrupt", "third"])) if reads else None,
        source_prompts=draw(st.none() | st.permutations(range(PROMPTS)).map(tuple)) if reads else None,
        values=values,
        offset=offset,
    )


def positions(*, touched: bool) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    some = st.lists(st.integers(0, LENGTH - 1), min_size=int(touched), max_size=4, unique=True).map(tuple)
    return st.tuples(*[some] * PROMPTS)


@st.composite
def sweeps(draw: st.DrawFn, anatomy: Anatomy) -> list[Trial]:
    count = draw(st.integers(1, 12))
    trials = []
    for index in range(count):
        chosen = draw(st.lists(edits(anatomy), min_size=1, max_size=3))
        prompts = draw(st.lists(st.integers(0, PROMPTS - 1), min_size=1, max_size=PROMPTS, unique=True))
        stream = draw(st.sampled_from(["corrupt", "clean"]))
        trials.append(Trial(index, stream, tuple(chosen), tuple(sorted(prompts))))
    return trials


def three_streams(read: list[list[int]]) -> Bucket:
    tokens = two_streams().tokens
    return Bucket.of({**tokens, "third": tokens["clean"].flip(0, 1)}, torch.tensor(read))


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data(), name=st.sampled_from(FAMILIES), rows=st.integers(1, 64))
def test_random_trials_are_what_plain_hooks_give(data: st.DataObject, name: str, rows: int) -> None:
    model, anatomy = family(name)
    trials = data.draw(sweeps(anatomy))
    reads = data.draw(st.integers(1, 3))
    read = st.lists(st.integers(0, LENGTH - 1), min_size=reads, max_size=reads)
    bucket = three_streams(data.draw(st.lists(read, min_size=PROMPTS, max_size=PROMPTS)))
    want = run("hooks", model, anatomy, bucket, trials)
    executor = data.draw(st.sampled_from(["packed", "packed", "resume"]))
    assert deviation(run(executor, model, anatomy, bucket, trials, rows), want) <= 1e-4


def test_edits_of_one_site_are_made_in_the_trials_order_whatever_the_order_in_other_trials() -> None:
    model, anatomy = family("llama")
    at = ((2,),) * PROMPTS
    double = Edit(Site("resid_pre", 1), "scale", at, values=torch.tensor(2.0))
    shift = Edit(Site("resid_pre", 1), "add", at, values=torch.ones(1, 1, anatomy.d_model))
    every = tuple(range(PROMPTS))
    triple = Edit(Site("resid_pre", 1), "scale", at, values=torch.tensor(3.0))
    orders = [(double, shift), (triple, shift), (shift, triple)]
    trials = [Trial(i, "corrupt", order, every) for i, order in enumerate(orders)]
    want = run("hooks", model, anatomy, two_streams(), trials)
    assert (want.trials[1] - want.trials[2]).abs().max() > 0.01
    for executor in ("packed", "resume"):
        assert deviation(run(executor, model, anatomy, two_streams(), trials), want) <= 1e-5


def test_what_leaves_a_layer_is_edited_before_what_enters_the_next() -> None:
    model, anatomy = family("llama")
    at, every = ((2,),) * PROMPTS, tuple(range(PROMPTS))

    def pair(first: Site, second: Site) -> tuple[Edit, Edit]:
        scale = Edit(first, "scale", at, values=torch.tensor(2.0))
        return Edit(second, "add", at, values=torch.ones(1, 1, anatomy.d_model)), scale

    between = pair(Site("resid_post", 0), Site("resid_pre", 1))
    start = pair(Site("embed", 0), Site("resid_pre", 0))
    trials = [Trial(0, "corrupt", between, every), Trial(1, "corrupt", start, every)]
    want = run("hooks", model, anatomy, two_streams(), trials)
    for executor in ("packed", "resume"):
        assert deviation(run(executor, model, anatomy, two_streams(), trials), want) <= 1e-5
