"""The engine's plain hooks mean what they say: values and effects against an oracle written by hand."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine.edits import Edit, Site, Trial
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from mechinterp_cli.models.walk import forward
from tests.engine_trials import PROMPTS, run, two_streams
from tests.families import build
from tests.oracle import NAMES, Oracle, Place

AT = ((1, 7), (2,), (11, 15))
"""Edited positions of each prompt."""
CLOSE = 3e-6


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, masked keys apart (−inf in one implementation, a huge number in the other)."""
    seen = (a > -1e30) & (b > -1e30)
    same_keys = torch.equal(a > -1e30, b > -1e30)
    a, b = (torch.where(seen, x, 0.0) for x in (a, b))
    return same_keys and float((a - b).abs().max()) <= 2e-5 * float(b.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("name", NAMES)
def test_the_oracles_own_attention_gives_the_models_logits(name: str) -> None:
    tokens = two_streams().tokens["clean"]
    logits, _ = Oracle(name).run(tokens)
    with torch.no_grad():
        native = forward(build(name), tokens)
    assert (logits - native).abs().max() <= CLOSE * native.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_the_anatomys_sites_are_those_of_the_oracle_and_hold_the_same_values(name: str) -> None:
    model, tokens = build(name), two_streams().tokens["clean"]
    anatomy = find_anatomy(model)
    sites = {Site(kind, layer.index) for layer in anatomy.layers for kind in layer.sites}
    _, want = Oracle(name).run(tokens)
    assert {(site.kind, site.layer) for site in sites} == set(want)
    got = read_sites(model, anatomy, sites, lambda: forward(model, tokens))
    assert [site for site in sites if not close(got[site], want[site.kind, site.layer])] == []


@pytest.mark.parametrize("name", NAMES)
def test_replacing_and_zeroing_a_site_has_the_effect_that_it_has_in_the_oracle(name: str) -> None:
    model, oracle, bucket = build(name), Oracle(name), two_streams()
    trials = list(replace_and_zero(find_anatomy(model)))
    values = run("hooks", model, find_anatomy(model), bucket, trials)
    _, clean = oracle.run(bucket.tokens["clean"])
    base, _ = oracle.run(bucket.tokens["corrupt"])
    worst: dict[Place, float] = {}
    for trial, got in zip(trials, values.trials, strict=True):
        edit = trial.edits[0]
        place = (edit.site.kind, edit.site.layer)
        want, _ = oracle.run(bucket.tokens["corrupt"], {place: partial(changed, edit=edit, clean=clean[place])})
        assert (want - base).abs().max() > 1e-3, "the edit must do something"
        worst[place] = max(worst.get(place, 0.0), float((got - want).abs().max() / base.abs().max()))
    assert {place: w for place, w in worst.items() if w > CLOSE} == {}


def replace_and_zero(anatomy: Anatomy) -> Iterator[Trial]:
    """Every site replaced from the clean stream, or one unit (or key) of it zero, layer about."""
    every = tuple(range(PROMPTS))
    for layer in anatomy.layers:
        for kind in layer.sites:
            site = Site(kind, layer.index)
            keys = (AT[0][:1], AT[1], AT[2][:1]) if kind in ("scores", "pattern") else None
            zero = Edit(site, "zero", AT, units=(1,), keys=keys)
            edit = zero if layer.index == 1 or kind == "embed" else Edit(site, "replace", AT, source="clean")
            yield Trial(0, "corrupt", (edit,), every)


def changed(x: Tensor, edit: Edit, clean: Tensor) -> Tensor:
    """The same edit by plain loops."""
    for prompt, positions in enumerate(edit.positions):
        for position in positions:
            if edit.op == "replace":
                x[prompt, position] = clean[prompt, position]
            elif edit.keys is None:
                x[prompt, position, 1] = 0.0
            else:
                x[prompt, position, 1, list(edit.keys[prompt])] = 0.0
    return x
