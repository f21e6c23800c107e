import pytest
import torch

from benchmarks.architecture_trials import proof_work
from benchmarks.tiny import tiny_tokens
from mechinterp_cli.engine.proof import prove
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.kinds import SITE_KINDS
from tests.families import FAMILIES, build


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_declares_the_sites_it_has_and_no_others(name: str) -> None:
    family, anatomy = FAMILIES[name], find_anatomy(build(name))
    assert set(SITE_KINDS) - set(anatomy.sites) == family.lacks
    partly = {kind: tuple(a.index for a in anatomy.layers if kind in a.missing) for kind in anatomy.sites}
    partly.pop("embed")  # of layer 0 alone, by definition
    assert {kind: layers for kind, layers in partly.items() if layers} == family.partly


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_executor_proves_itself_on_every_site_and_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        before = model(input_ids=tiny_tokens()).logits
    anatomy = find_anatomy(model)
    proof = prove(model, anatomy, [proof_work(anatomy)])
    assert proof.executor == FAMILIES[name].executor
    assert proof.deviation <= 1e-4
    with torch.no_grad():
        assert torch.equal(model(input_ids=tiny_tokens()).logits, before)
