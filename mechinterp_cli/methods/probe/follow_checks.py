"""Is a causal follow-up possible? Everything that is wrong with it is told before any forward pass."""

from collections.abc import Iterable, Mapping, Sequence

from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.binder import Binder, KeyPath
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.methods.probe.causal_split import Split, chosen, hold_out, subset
from mechinterp_cli.methods.probe.directions import LINEAR
from mechinterp_cli.methods.probe.follow import FollowUp
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.readout import Readout
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.metrics import check_prompts, find_metric
from mechinterp_cli.tasks.prompts import PromptSet

PATH: KeyPath = ("probe", "causal")


def with_name(names: Sequence[ProbeName], options: CausalOptions | None) -> ProbeName | None:
    """The probe whose directions are kept and tried: the one that is named, or the first linear one."""
    if options is not None and options.probe is not None:
        return options.probe
    return next((name for name in names if name in LINEAR), None)


def with_directions(readouts: Sequence[Readout]) -> list[Readout]:
    """Places that are read at one position of every text, or word."""
    return [readout for readout in readouts if all(len(at) == 1 for at in readout.reading.view.positions)]


def follow_up(
    setting: Setting, options: CausalOptions, names: Sequence[ProbeName], readouts: Sequence[Readout]
) -> FollowUp:
    """A follow-up that can be carried out.

    Args:
        setting: Config, model, prompts.
        options: The section.
        names: The probes.
        readouts: All places.

    Raises:
        UserError: No linear probe, no place with one position, prompts without answers, too few to be split, a position
            or a layer that is not there; names the key.
    """
    loaded, name = setting.loaded, with_name(names, options)
    if name is None:
        problem = f"directions need a linear probe, and probes are {', '.join(names)}"
        raise loaded.error(PATH, problem, "Put logistic, mass_mean or lda first in probe.probes.")
    if name not in names:
        problem = f"{name} is not among probe.probes, which are {', '.join(names)}"
        raise loaded.error((*PATH, "probe"), problem, "Add it there, or leave the key out.")
    places = with_directions(readouts)
    if not places:
        problem = "every site block averages several positions, and what was found there is at none of them"
        raise loaded.error(PATH, problem, "Read one position: positions: last, or pool: last.")
    split = _split(setting, options)
    _check_classes(setting, split, places)
    prompts = subset(setting.prompts, split.measured)
    where, bound = _places(setting, options, prompts, split, places)
    _check_layers(setting, options, places)
    found = FollowUp(setting, options, name, split, places, bound, where)
    found.check()
    return found


def _split(setting: Setting, options: CausalOptions) -> Split:
    loaded, prompts = setting.loaded, setting.prompts
    metrics = [find_metric(name) for name in loaded.config.metrics]
    try:
        check_prompts(metrics, prompts.prompts, prompts.task)
    except UserError as error:
        raise loaded.error(PATH, f"what is done must move an answer; {error.cause}", error.remedy) from error
    try:
        fitted, held = hold_out(prompts, options)
    except UserError as error:
        raise loaded.error((*PATH, "hold_out"), error.cause, error.remedy) from error
    return Split(fitted, held, chosen(prompts, _candidates(setting, options, held), options))


def _candidates(setting: Setting, options: CausalOptions, held: Sequence[int]) -> Sequence[int]:
    """Those of the prompts held out that can be measured: with a twin to swap with, and right where that is asked."""
    prompts = setting.prompts.prompts
    if "swap" in options.interventions:
        held = [i for i in held if prompts[i].corrupt_tokens is not None] or held
    if setting.loaded.config.resolved()["task"].get("keep") != "correct":
        return held
    if setting.moment.name is not None:
        problem = "correct measures the prompts that a model gets right, which are others at each checkpoint"
        raise setting.loaded.error(("task", "keep"), problem, "Leave out model.checkpoints, or keep all prompts.")
    if not setting.compute:
        return held
    some = subset(setting.prompts, held)
    kept, _ = measuring.keep_correct(some, measuring.clean_logits(setting.model, some), top=False)
    right = {id(prompt) for prompt in kept.prompts}
    return [i for i in held if id(prompts[i]) in right]


def _check_classes(setting: Setting, split: Split, places: Iterable[Readout]) -> None:
    """Every class must be among the samples that directions are fitted on."""
    fitted = set(split.fitted)
    for readout in places:
        problem, view = readout.problem, readout.reading.view
        rows = [row for row, prompt in enumerate(view.prompts) if prompt in fitted]
        there = set(problem.targets[rows].tolist())
        if len(there) < (problem.classes or 2):
            what = "class" if problem.classes is not None else "number"
            cause = f"of {len(rows)} samples that are left to fit directions on, {len(there)} {what} is all there is"
            if len(there) > 1:
                cause = f"the {len(rows)} samples that are left to fit directions on lack a class"
            raise setting.loaded.error((*PATH, "hold_out"), cause, "Hold out less, or give more prompts.")


def _places(
    setting: Setting, options: CausalOptions, prompts: PromptSet, split: Split, readouts: Sequence[Readout]
) -> tuple[Mapping[str, Sequence[int]], Sequence[Place]]:
    """By the view's name the numbers of its places; and the places."""
    views = {readout.reading.view.name: readout for readout in readouts}
    binder = Binder(setting.loaded, "probe", setting.model.anatomy, prompts)
    per_word = bool(setting.prompts.prompts[0].words)
    if options.positions is not None or per_word:
        found = list(binder.places(options.positions or "last", PATH))
        return {name: range(len(found)) for name in views}, found
    own = [_own_place(readout, split) for readout in views.values()]
    return {name: (number,) for number, name in enumerate(views)}, own


def _own_place(readout: Readout, split: Split) -> Place:
    """Where a text's probe reads, of the measured prompts."""
    reading = readout.reading
    at = dict(zip(reading.view.prompts, reading.view.positions, strict=True))
    positions = tuple(at.get(prompt) for prompt in split.measured)
    return Place(positions, position=reading.position, span=reading.span, template=reading.template)


def _check_layers(setting: Setting, options: CausalOptions, places: Sequence[Readout]) -> None:
    if not isinstance(options.downstream, tuple):
        return
    layers = sorted({readout.reading.site.layer for readout in places})
    for number, layer in enumerate(options.downstream):
        if layer not in layers:
            problem = f"{layer}: no probe reads this layer"
            raise setting.loaded.error((*PATH, "downstream", number), problem, f"Layers with probes: {layers}.")
