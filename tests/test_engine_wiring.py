"""The residual stream as the sum of its parts on six families, parts run by themselves, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.wiring import ADDITIVE, wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.record import hooked
from tests.attribution_cases import Case, in_float64
from tests.edge_oracle import both
from tests.families import build
from tests.models_fixtures import planted, smollm2, toy

__all__ = ["planted", "smollm2", "toy"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "qwen3", "granite", "olmo2"])
def test_what_sources_write_and_constants_are_the_stream_at_every_target(family: str) -> None:
    case = Case.of(build(family))
    with in_float64(case.model):
        wiring, stream = wired(case.model, case.anatomy), both(case)[0]
        written = wiring.written(stream.seen)
        for source, own in zip(wiring.graph.sources, written.unbind(1), strict=True):
            want = stream.output(source)
            assert (own - want).abs().max() <= 1e-6 * want.abs().max(), source.name
        sums = written.cumsum(1)
        for target, reads in zip(wiring.graph.targets, wiring.graph.reads, strict=True):
            place, _ = stream.places(target)
            want = stream.seen[place]
            error = sums[:, reads - 1] + wiring.constant(target.layer + (place.kind == "resid_mid")) - want
            assert error.abs().max() <= 1e-6 * want.abs().max(), target.name
        short = sums[:, -2] + wiring.constant(case.anatomy.n_layers) - want
        assert short.abs().max() > 1e-2 * want.abs().max(), "the last MLP is missing from this sum"


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "granite"])
def test_the_sum_holds_in_float32(family: str) -> None:
    case = Case.of(build(family))
    wiring = wired(case.model, case.anatomy)
    assert wiring.deviation <= 1e-6
    last = both(case)[0].seen[Site("resid_post", 2)]
    total = wiring.written(both(case)[0].seen).sum(1) + wiring.constant(3)
    assert (total - last).abs().max() <= ADDITIVE * last.abs().max()


def test_norms_after_attention_are_found() -> None:
    for family, normed in (("gemma2", True), ("olmo2", True), ("granite", False), ("gpt2", False)):
        case = Case.of(build(family))
        assert set(wired(case.model, case.anatomy).normed) == {normed}


def test_the_zoo_is_wired(toy: LoadedModel, planted: LoadedModel) -> None:
    for loaded in (toy, planted):
        wiring = wired(loaded.model, loaded.anatomy)
        assert wiring.deviation <= 1e-5
        assert wiring.graph.sources == Graph.of(loaded.anatomy).sources


@pytest.mark.slow
def test_a_real_model_is_wired(smollm2: LoadedModel) -> None:
    wiring = wired(smollm2.model, smollm2.anatomy)
    assert wiring.deviation <= 1e-4
    assert (len(wiring.graph.sources), len(wiring.graph.targets)) == (301, 481)
    thrice = sum(3 if target.kind in ("k", "v") else 1 for target in wiring.graph.targets)
    assert thrice == 841


def test_a_stream_that_is_no_sum_is_refused() -> None:
    """Another stream enters layer 2 than leaves layer 1."""
    model = build("llama")
    anatomy = find_anatomy(model)

    def more(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + 1, *args[1:])

    with hooked([model.model.layers[2].register_forward_pre_hook(more)]):
        with pytest.raises(UserError) as error:
            wired(model, anatomy)
        assert "is not the sum of its heads and MLPs" in error.value.cause
    assert "patch whole sites" in error.value.remedy
    assert wired(model, anatomy)


def test_an_mlp_that_reads_more_than_its_stream_is_refused() -> None:
    """Layer 1's MLP is given what entered the layer, too."""
    model = build("llama")
    anatomy = find_anatomy(model)
    entered: list[Tensor] = []

    def note(_module: nn.Module, args: Any) -> None:
        entered.append(args[0])

    def mixed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        more: Tensor = torch.linalg.vector_norm(entered[-1], dim=-1, keepdim=True)
        return output * (1 + more)

    layer = model.model.layers[1]
    with (
        hooked([layer.register_forward_pre_hook(note), layer.mlp.register_forward_hook(mixed)]),
        pytest.raises(UserError, match="mlp_out of layer 1 depends on more than the stream it reads"),
    ):
        wired(model, anatomy)


def test_layers_that_are_not_chained_are_refused() -> None:
    case = Case.of(build("llama"))
    torn = type(case.anatomy)(**{**vars(case.anatomy), "chained": False})
    with pytest.raises(UserError, match="what leaves a layer is not what enters the next one"):
        wired(case.model, torn)


def test_parts_by_themselves_leave_no_hooks() -> None:
    case = Case.of(build("gpt_neox"))
    wiring = wired(case.model, case.anatomy)
    calls = wiring.calls(case.base)
    stream = both(case)[0].seen
    entering = stream[Site("resid_pre", 1)]
    q = wiring.attention_inputs(1, calls[1], entering)["q"]
    assert torch.allclose(q, stream[Site("q", 1)], atol=1e-5)
    assert torch.allclose(wiring.mlp_output(1, calls[1], entering), stream[Site("mlp_out", 1)], atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
