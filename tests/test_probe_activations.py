"""What a probe reads is what the config says, and files of it are used again, whole or not at all."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mechinterp_cli.engine.activations import View, gather
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.methods.binder import Binder
from mechinterp_cli.methods.probe import activations as module
from mechinterp_cli.methods.probe.activations import Activations, Keeping, Source, activations
from mechinterp_cli.methods.probe.site_options import ProbeSites
from mechinterp_cli.methods.probe.sites import Reading, asked_of, readings
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.random_twin import random_twin
from mechinterp_cli.runs import reserved
from mechinterp_cli.tasks.prompts import Prompt, PromptSet, Word
from tests.ablate_hooks import tiny
from tests.experiments import config_of
from tests.models_fixtures import toy

__all__ = ["toy"]

TINY = 1
"""A budget that nothing is within."""
AMPLE = 2**30


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(4)
    return [tuple(int(t) for t in torch.randint(0, 30, (n,), generator=generator)) for n in lengths]


def text(tokens: tuple[int, ...], template: str = "", **fields: Any) -> Prompt:
    spans = {"target": (1, 2), "end": (len(tokens) - 1,)}
    return Prompt("text", tokens, (), "", spans=spans, template=template, **fields)


TEXTS = PromptSet("made", tuple(text(tokens, label="a") for tokens in draw([6, 8, 6, 7])))
WORDED = PromptSet(
    "made",
    tuple(
        text(tokens, words=tuple(Word(at, "type", "a") for at in places))
        for tokens, places in zip(draw([6, 8, 6]), [((1, 2), (4,)), ((0,), (3, 4, 5), (7,)), ((5,),)], strict=True)
    ),
)
TEMPLATES = PromptSet("made", tuple(text(t, "one" if len(t) == 6 else "two", label="a") for t in draw([6, 7, 6, 7])))


def binder(folder: Path, model: LoadedModel, prompts: PromptSet) -> Binder:
    loaded = config_of(folder, {"sites": [{"kind": "z"}]})
    return Binder(replace(loaded, origins={}), "probe", model.anatomy, prompts)


def read(folder: Path, model: LoadedModel, prompts: PromptSet, *blocks: dict[str, Any]) -> tuple[Reading, ...]:
    return readings(binder(folder, model, prompts), [ProbeSites.model_validate(block) for block in blocks])


def views(found: Sequence[Reading]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {reading.view.name: reading.view.positions for reading in found}


def source_of(model: LoadedModel, sites: Sequence[Site] | None = None, prompts: PromptSet = TEXTS) -> Source:
    tokens = tuple(prompt.clean_tokens for prompt in prompts.prompts)
    everyone = tuple(range(len(tokens)))
    last = View("last", everyone, tuple((len(t) - 1,) for t in tokens))
    mean = View("mean", everyone, tuple(tuple(range(len(t))) for t in tokens))
    sites = sites or [Site("resid_post", 0), Site("z", 1), Site("resid_post", 1)]
    return Source(model, tokens, {site: [last, mean] for site in sites})


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[Site]]:
    """The sites of every pass that is made from now on."""
    made: list[frozenset[Site]] = []

    def noted(model: Any, anatomy: Any, tokens: Any, asked: Any, **options: Any) -> Any:
        made.append(frozenset(asked))
        return gather(model, anatomy, tokens, asked, **options)

    monkeypatch.setattr(module, "gather", noted)
    return made


def assert_same(found: Activations, wanted: Activations) -> None:
    assert found.rows.keys() == wanted.rows.keys()
    assert all(torch.equal(found.rows[key], wanted.rows[key]) for key in wanted.rows)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "activations").iterdir()) if (cache / "activations").exists() else []


# What the config says


def test_a_text_is_read_at_its_last_token_unless_said_otherwise(tmp_path: Path, toy: LoadedModel) -> None:
    found = read(tmp_path, toy, TEXTS, {})
    assert [(r.site, r.head, r.examples) for r in found] == [
        (Site("resid_post", layer), None, (0, 1, 2, 3)) for layer in range(2)
    ]
    assert views(found) == {"last": ((5,), (7,), (5,), (6,))}


def test_means_leave_an_added_first_token_out(tmp_path: Path, toy: LoadedModel) -> None:
    plain = views(read(tmp_path, toy, TEXTS, {"positions": "mean"}))["mean"]
    without = views(read(tmp_path, toy, replace(TEXTS, add_bos=True), {"positions": "mean"}))["mean"]
    assert plain == tuple(tuple(range(p.length)) for p in TEXTS.prompts)
    assert without == tuple(at[1:] for at in plain)


def test_spans_are_read_at_their_last_token_or_averaged(tmp_path: Path, toy: LoadedModel) -> None:
    last = read(tmp_path, toy, TEXTS, {"positions": ["target", 3, "target+1"], "layers": [1]})
    assert views(last) == {"span target": ((2,),) * 4, "position 3": ((3,),) * 4, "span target+1": ((3,),) * 4}
    assert [(r.position, r.span) for r in last] == [(None, "target"), (3, None), (None, "target+1")]
    mean = read(tmp_path, toy, TEXTS, {"positions": ["target"], "pool": "mean"})
    assert views(mean) == {"mean of target": ((1, 2),) * 4}


def test_each_position_is_read_template_by_template(tmp_path: Path, toy: LoadedModel) -> None:
    found = read(tmp_path, toy, TEMPLATES, {"positions": "each", "layers": [0]})
    assert [(r.template, r.position) for r in found] == [("one", i) for i in range(6)] + [("two", i) for i in range(7)]
    assert {r.examples for r in found if r.template == "two"} == {(1, 3)}
    assert len({r.view.name for r in found}) == 13


def test_labelled_words_are_read_at_their_last_token(tmp_path: Path, toy: LoadedModel) -> None:
    (found,) = read(tmp_path, toy, WORDED, {"layers": [1]})
    assert found.view == View("word", (0, 0, 1, 1, 1, 2), ((2,), (4,), (0,), (5,), (7,), (5,)))
    assert found.examples == tuple(range(6))
    (mean,) = read(tmp_path, toy, WORDED, {"layers": [1], "positions": "word", "pool": "mean"})
    assert mean.view.positions[3] == (3, 4, 5)


def test_heads_are_read_one_by_one_or_side_by_side(tmp_path: Path, toy: LoadedModel) -> None:
    assert [r.head for r in read(tmp_path, toy, TEXTS, {"kind": "z", "layers": [1]})] == [0, 1, 2, 3]
    assert [r.head for r in read(tmp_path, toy, TEXTS, {"kind": "z", "layers": [1], "heads": "all"})] == [None]
    found = read(tmp_path, toy, TEXTS, {"kind": "z", "layers": [1], "heads": [2]})
    assert [reading.label for reading in found] == ["z, layer 1, head 2, last"]
    llama = tiny("llama", toy)
    assert [r.head for r in read(tmp_path, llama, TEXTS, {"kind": "k", "layers": [0]})] == [0, 1]  # key/value heads


def test_all_views_of_a_site_are_asked_for_together_and_once(tmp_path: Path, toy: LoadedModel) -> None:
    blocks: list[dict[str, Any]] = [
        {"kind": "z", "heads": [0, 1]},
        {"kind": "z", "heads": [2], "positions": "mean"},
        {"layers": [1]},
    ]
    asked = asked_of(read(tmp_path, toy, TEXTS, *blocks))
    names = {site: [view.name for view in found] for site, found in asked.items()}
    both = ["last", "mean"]
    assert names == {Site("z", 0): both, Site("z", 1): both, Site("resid_post", 1): ["last"]}


@pytest.mark.parametrize(
    ("blocks", "prompts", "message"),
    [
        ([{"layers": [0, 48]}], TEXTS, "probe.sites[0].layers[1]: 48 is outside 0..1"),
        ([{}, {"heads": [1]}], TEXTS, "probe.sites[1].heads: resid_post has no heads"),
        ([{"kind": "z", "heads": [0, 9]}], TEXTS, "probe.sites[0].heads[1]: 9 is outside 0..3"),
        ([{"positions": ["verb"]}], TEXTS, "probe.sites[0].positions[0]: span 'verb' of task 'made' does not exist"),
        ([{"positions": [2, 6]}], TEXTS, "probe.sites[0].positions[1]: 6 is outside 0..5"),
        ([{"positions": "each"}], TEXTS, "probe.sites[0].positions: `each` needs prompts of one length"),
        ([{"positions": "last"}], WORDED, "probe.sites[0].positions: the labels stand at words"),
        ([{"positions": "word"}], TEXTS, "probe.sites[0].positions: the texts have one label each"),
        ([{"kind": "q", "positions": "mean"}], TEXTS, "probe.sites[0].positions: q is turned by its position"),
        ([{"kind": "k", "pool": "mean"}], WORDED, "probe.sites[0].pool: k is turned by its position"),
        ([{"kind": "embed", "layers": [1]}], TEXTS, "probe.sites[0].layers[0]: 1: embed is what enters layer 0"),
        (
            [{"layers": [1]}, {"positions": ["end"]}],
            TEXTS,
            "probe.sites[1]: resid_post, layer 1, last is read by probe.sites[0] already",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_its_key(
    tmp_path: Path, toy: LoadedModel, blocks: list[dict[str, Any]], prompts: PromptSet, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, toy, prompts, *blocks)
    assert message in str(caught.value)
    assert caught.value.remedy


def test_a_site_that_a_model_lacks_is_refused_with_the_reason(tmp_path: Path, toy: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"probe.sites\[0\].kind: neuron: the MLP has no single down projection"):
        read(tmp_path, tiny("mixtral", toy), TEXTS, {"kind": "neuron"})


@pytest.mark.parametrize("kind", ["scores", "pattern", "resid"])
def test_kinds_without_a_vector_per_token_are_no_option(kind: str) -> None:
    with pytest.raises(ValueError, match="resid_post"):
        ProbeSites.model_validate({"kind": kind})


# What is given


def test_one_head_or_all_side_by_side_can_be_looked_up(toy: LoadedModel) -> None:
    found = activations(source_of(toy), Keeping("never"))
    whole = found.at(Site("z", 1), None, "last")
    heads = [found.at(Site("z", 1), head, "last") for head in range(4)]
    assert whole.shape == (4, 64)
    assert torch.equal(torch.cat(heads, dim=1), whole)
    assert found.at(Site("resid_post", 0), None, "mean").shape == (4, 64)


def test_files_are_made_only_beyond_the_budget_or_where_they_are_wanted(toy: LoadedModel, cache: Path) -> None:
    source = source_of(toy)
    plain = activations(source, Keeping("auto", source.bytes))
    assert_same(activations(source, Keeping("never", TINY)), plain)
    assert files(cache) == []
    assert plain.computed == source.asked.keys() and not plain.reused
    assert_same(activations(source, Keeping("auto", source.bytes - 1)), plain)
    assert len(files(cache)) == 3  # one for each site
    assert source.bytes == sum(rows.nbytes for rows in plain.rows.values())


def test_a_later_run_makes_no_pass(toy: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = passes_of(monkeypatch)
    source = source_of(toy)
    first = activations(source, Keeping("always"))
    assert made == [source.asked.keys()]
    second = activations(source, Keeping("auto", TINY))
    assert len(made) == 1
    assert second.reused == source.asked.keys() and not second.computed
    assert_same(second, first)
    assert_same(second, activations(source, Keeping("never")))


def test_only_sites_that_no_run_has_kept_are_computed(toy: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = passes_of(monkeypatch)
    few, more = [Site("z", 1)], [Site("resid_post", 0), Site("z", 1)]
    activations(source_of(toy, few), Keeping("always"))
    found = activations(source_of(toy, more), Keeping("always"))
    assert made == [{Site("z", 1)}, {Site("resid_post", 0)}]
    assert_same(found, activations(source_of(toy, more), Keeping("never")))


def other_tokens(source: Source) -> Source:
    first, *rest = source.tokens
    return replace(source, tokens=((*first[:-1], (first[-1] + 1) % 30), *rest))


def other_view(source: Source) -> Source:
    moved = {site: [replace(v, positions=((0,), *v.positions[1:])) for v in vs] for site, vs in source.asked.items()}
    return replace(source, asked=moved)


@pytest.mark.parametrize(
    "change",
    [
        other_tokens,
        other_view,
        lambda source: replace(source, model=random_twin(source.model, 0)),
        lambda source: replace(
            source, model=replace(source.model, source=replace(source.model.source, dtype="float64"))
        ),
    ],
    ids=["tokens", "positions", "weights", "type"],
)
def test_whatever_changes_the_numbers_changes_the_files(
    toy: LoadedModel, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    made = passes_of(monkeypatch)
    source = source_of(toy)
    activations(source, Keeping("always"))
    activations(change(source), Keeping("always"))
    assert len(made) == 2
    activations(source, Keeping("always"))
    assert len(made) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename_arrays(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"last"', b'"lost"'))


def swap_with_another(path: Path) -> None:
    others = [other for other in path.parent.iterdir() if other != path]
    same = next(other for other in others if other.stat().st_size == path.stat().st_size)
    path.write_bytes(same.read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, empty, rename_arrays, swap_with_another])
def test_a_damaged_or_foreign_file_is_computed_again_and_said(
    toy: LoadedModel, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    source = source_of(toy)
    whole = activations(source, Keeping("always"))
    copy = {key: rows.clone() for key, rows in whole.rows.items()}
    made, said = passes_of(monkeypatch), list[str]()
    activations(source, Keeping("always"), say=said.append)
    assert (made, said) == ([], [])
    victim = files(cache)[0]
    del whole
    damage(victim)
    found = activations(source, Keeping("always"), say=said.append)
    assert len(made) == 1 and len(made[0]) == 1 and made[0] == found.computed
    assert len(said) == 1 and str(victim) in said[0] and "is damaged, or another file" in said[0]
    assert_same(found, Activations(copy))
    activations(source, Keeping("always"), say=said.append)
    assert len(made) == len(said) == 1


def test_files_are_safetensors_with_the_rows_in_them(toy: LoadedModel, cache: Path) -> None:
    found = activations(source_of(toy, [Site("z", 1)]), Keeping("always"))
    (path,) = files(cache)
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["last", "mean"]
        for name in ("last", "mean"):
            assert torch.equal(file.get_tensor(name), found.rows[Site("z", 1), name])


def test_kept_rows_are_mapped_from_their_files_and_changing_them_does_not_change_the_files(
    toy: LoadedModel, cache: Path
) -> None:
    found = activations(source_of(toy, [Site("z", 1)]), Keeping("always"))
    (path,) = files(cache)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    before = path.read_bytes()
    found.rows[Site("z", 1), "last"].zero_()
    assert path.read_bytes() == before


def test_rows_go_to_the_file_without_being_held(toy: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def noted(model: Any, anatomy: Any, tokens: Any, asked: Any, **options: Any) -> Any:
        given.extend(options["into"].values())
        return gather(model, anatomy, tokens, asked, **options)

    monkeypatch.setattr(module, "gather", noted)
    activations(source_of(toy), Keeping("always"))
    assert len(given) == 6
    assert all(str(rows.untyped_storage().filename).endswith(".tmp") for rows in given)


def test_a_pass_that_fails_leaves_no_file(toy: LoadedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **options: Any) -> None:
        next(iter(options["into"].values())).fill_(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "gather", stop)
    with pytest.raises(KeyboardInterrupt):
        activations(source_of(toy), Keeping("always"))
    assert files(cache) == []


def refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_kept_stays_in_memory_where_it_fits(
    toy: LoadedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = activations(source_of(toy), Keeping("never"))
    monkeypatch.setattr(reserved, "_make", refuse)
    said = list[str]()
    assert_same(activations(source_of(toy), Keeping("always", AMPLE), say=said.append), wanted)
    assert len(said) == 1 and "No space left on device: activations are not kept for later runs" in said[0]
    with pytest.raises(RunError, match="No space left on device") as caught:
        activations(source_of(toy), Keeping("auto", TINY))
    assert "MECHINTERP_CACHE" in caught.value.remedy
    assert files(cache) == []


def test_the_disk_is_full_before_the_first_pass_and_not_in_it(
    toy: LoadedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = passes_of(monkeypatch), reserved._make
    left = [2]  # files that there is room for; none of them may be left as if it were whole

    def two(path: Path, size: int) -> None:
        left[0] -= 1
        make(path, size) if left[0] >= 0 else refuse()

    monkeypatch.setattr(reserved, "_make", two)
    with pytest.raises(RunError):
        activations(source_of(toy), Keeping("auto", TINY))
    assert made == [] and files(cache) == []


def test_weights_of_unknown_origin_are_never_kept(toy: LoadedModel, cache: Path) -> None:
    nameless = replace(toy, source=replace(toy.source, weight_files={}))
    found = activations(source_of(nameless), Keeping("always"))
    assert files(cache) == []
    assert_same(found, activations(source_of(toy), Keeping("never")))


def test_the_random_twin_is_read_by_the_same_code(toy: LoadedModel) -> None:
    twin = random_twin(toy, 0)
    ours, theirs = (activations(source_of(model), Keeping("always")) for model in (toy, twin))
    assert ours.rows.keys() == theirs.rows.keys()
    for key, rows in theirs.rows.items():
        assert rows.isfinite().all() and not np.allclose(rows, ours.rows[key])
    assert_same(theirs, activations(source_of(twin), Keeping("never")))
