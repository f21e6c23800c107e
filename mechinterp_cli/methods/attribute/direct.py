"""Direct logit attribution: what every component adds to the logit difference, checked to sum to all of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mechinterp_cli.errors import RunError
from mechinterp_cli.methods.attribute.options import DirectOptions
from mechinterp_cli.methods.attribute.parts import (
    direct_table,
    means_table,
    neuron_parts,
    parts_of,
    span_parts,
)
from mechinterp_cli.methods.attribute.splits import Neurons, Sources
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.direct_effects import ADDITIVE, DirectEffects, Paths, Split, direct_effects
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.linear import linear_maps
from mechinterp_cli.tasks.registry import tasks_with_answers
from mechinterp_cli.tasks.tokenise import Encoder

PATH = ("attribute", "direct")
FEW_PROMPTS = 20


def check_direct(options: DirectOptions, setting: Setting) -> None:
    """Refuse what this model or these prompts do not allow, before any forward pass.

    Raises:
        UserError: A prompt without answer or wrong answer, a model whose layers do not add to one residual stream,
            neurons or sources that no layer has; names file, line and key.
    """
    _check_answers(setting)
    _check_layers(setting)
    anatomy = setting.model.anatomy
    if options.neurons and (reason := _nowhere(anatomy, "neuron")):
        remedy = "Leave neurons out: each MLP's part as a whole is there without it."
        raise setting.loaded.error((*PATH, "neurons"), f"no layer's MLP can be split: {reason}", remedy)
    if options.sources and (reason := _nowhere(anatomy, "pattern")):
        remedy = "Leave sources out: what attention adds as a whole is there without it."
        raise setting.loaded.error((*PATH, "sources"), f"no layer's heads can be split by token: {reason}", remedy)


def _check_answers(setting: Setting) -> None:
    for index, prompt in enumerate(setting.prompts.prompts):
        if prompt.answer and prompt.wrong_answer:
            continue
        lacking = "wrong answer" if prompt.answer else "answer"
        of = f"prompt {index} of task {setting.prompts.task!r}"
        problem = f"a logit difference needs an answer and a wrong answer, and {of} has no {lacking}"
        remedy = f"Use prompts with both (tasks with answers: {', '.join(tasks_with_answers())}), or leave direct out."
        raise setting.loaded.error(PATH, problem, remedy)


def _check_layers(setting: Setting) -> None:
    anatomy = setting.model.anatomy
    reason = None if anatomy.chained else "this model's layers do not hand one residual stream on to each other"
    for layer in anatomy.layers:
        if "attn_out" in layer.missing and "mlp_out" in layer.missing:
            reason = reason or f"layer {layer.index} is no sum of parts: {layer.missing['mlp_out']}"
    if reason:
        raise setting.loaded.error(PATH, reason, "Leave direct out for this model; lens and sites need no such sum.")


def _nowhere(anatomy: Anatomy, kind: str) -> str | None:
    """Why no layer has a kind of site; None where one has."""
    return anatomy.layers[-1].missing[kind] if kind not in anatomy.sites else None


@dataclass(frozen=True, eq=False)
class _Found:
    """Everything that was computed."""

    effects: DirectEffects
    softcap: float | None
    neurons: Neurons | None
    sources: Sources | None


def direct_tables(options: DirectOptions, setting: Setting, bench: Bench) -> dict[str, Any]:
    """Follow every component to the logits of the clean prompts' last position.

    Rows whose `part_of` is the same sum to the component of that name: embedding, heads, attention's biases, MLPs and
    the constant to `total`, the logit difference before soft-capping; a layer's neurons to its `mlp`; a head's sources
    to the `head`. Components that a model does not have, such as biases, have no rows.

    Args:
        options: What is split further.
        setting: Model and prompts, checked by `check_direct`.
        bench: Told of progress, warnings and what was proved.

    Returns:
        Tables `direct` and `components`, and with `sources` the table of that name: means by the span that a head
        attends to.

    Raises:
        UserError: The model's logits are not of the form that has parts.
        RunError: The parts do not sum to the whole.
    """
    bench.stage("following every component to the logits")
    found = _compute(options, setting, bench)
    _tell(found, setting, bench)
    prompts, anatomy = setting.prompts, setting.model.anatomy
    parts = parts_of(found.effects, anatomy)
    if found.neurons is not None and found.neurons.by_layer:
        parts += neuron_parts(found.neurons, None if options.top == "all" else options.top)
    encoder = Encoder.of(setting.model.tokenizer, add_bos=False, vocab_size=anatomy.vocab_size)
    tokens = [encoder.strings(prompt.clean_tokens) for prompt in prompts.prompts]
    stats = setting.loaded.config.stats
    tables = {
        "direct": direct_table(parts, found.sources, prompts.prompts, tokens),
        "components": means_table(parts, prompts, stats),
    }
    if found.sources is not None and found.sources.by_prompt:
        tables["sources"] = means_table(span_parts(found.sources, prompts.prompts), prompts, stats)
    return tables


def _compute(options: DirectOptions, setting: Setting, bench: Bench) -> _Found:
    model, prompts = setting.model, setting.prompts.prompts
    neurons = Neurons(model.anatomy, len(prompts)) if options.neurons else None
    sources = Sources(model.anatomy) if options.sources else None
    splits: list[Split] = [split for split in (neurons, sources) if split is not None]
    with linear_maps(model.model, model.anatomy) as maps:
        unembedding = maps.unembedding()
        if isinstance(unembedding, str):
            raise setting.loaded.error(PATH, unembedding, "Leave direct out for this model.")
        paths = Paths(model, maps, unembedding)
        total = len(prompts)
        effects = direct_effects(paths, prompts, splits, lambda done: bench.progress.advance(done, total))
    if isinstance(effects, str):
        raise RunError(f"attribute.direct: {effects}", "Leave direct out for this model, and please report it.")
    for split in (neurons, sources):
        if split is not None and not split.deviation <= ADDITIVE:
            key = "neurons" if split is neurons else "sources"
            problem = f"the parts do not sum to their whole: they are off by {split.deviation:.1e} of their size"
            raise RunError(f"attribute.direct.{key}: {problem}", f"Leave {key} out, and please report the model.")
    return _Found(effects, unembedding.softcap, neurons, sources)


def _tell(found: _Found, setting: Setting, bench: Bench) -> None:
    """What was proved goes into the manifest; what a reader must know of the numbers is a warning."""
    splits = {"neurons": found.neurons, "sources": found.sources}
    bench.note(
        {
            "direct": {
                "deviation": found.effects.deviation,
                "logits_deviation": found.effects.native,
                **{f"{name}_deviation": split.deviation for name, split in splits.items() if split is not None},
                "tolerance": ADDITIVE,
                "softcap": found.softcap,
            }
        }
    )
    for text in _warnings(found, setting):
        bench.warn(text)


def _warnings(found: _Found, setting: Setting) -> Iterator[str]:
    prompts = setting.prompts.prompts
    if found.softcap is not None:
        yield (
            f"direct: this model caps its logits softly at {found.softcap:g}; parts are of the linear part and sum to "
            "the logit difference before the cap"
        )
    if any(len(prompt.answer) > 1 or len(prompt.wrong_answer) > 1 for prompt in prompts):
        yield (
            "direct: where an answer is a set of tokens the total is a difference of mean logits, which is not the "
            "metric logit_diff (a log-sum-exp has no parts)"
        )
    have = {x.index for x in setting.model.anatomy.layers if "attn_out" in x.sites}
    whole = {layer: reason for layer, reason in found.effects.reasons.items() if layer in have}
    yield from _by_reason("heads are not told apart", whole)
    if found.neurons is not None:
        mlps = {x.index for x in setting.model.anatomy.layers if "mlp_out" in x.sites}
        reasons = {layer: reason for layer, reason in found.neurons.reasons.items() if layer in mlps}
        yield from _by_reason("neurons are not told apart", reasons)
    if found.sources is not None:
        yield from _by_reason("heads are not split by token", found.sources.reasons)
    if len(prompts) < FEW_PROMPTS:
        yield f"direct: {len(prompts)} prompts are fewer than {FEW_PROMPTS}; intervals are rough"


def _by_reason(what: str, reasons: Mapping[int, str]) -> Iterator[str]:
    """One sentence per reason, with the layers that it holds for."""
    for reason in dict.fromkeys(reasons.values()):
        layers = [str(layer) for layer, why in sorted(reasons.items()) if why == reason]
        yield f"direct: {what} in layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: {reason}"
