"""Moments of one training: which checkpoints an experiment runs on, and how many tokens each has seen."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.zoo import find_entry

_TOKENS_IN_NAME = re.compile(r"tokens([0-9]+)([KMBT])", re.IGNORECASE)
_SCALES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LAST_NUMBER = re.compile(r"([0-9]+)(?!.*[0-9])")


@dataclass(frozen=True)
class Moment:
    """A model to run on: one of several checkpoints, or the only one."""

    name: str | None
    """As the config names the checkpoint; None where it names none."""
    tokens_seen: int | None
    """In training, where that is known."""
    options: ModelOptions
    """What loads it."""

    @property
    def heading(self) -> str:
        """What stands before messages about it: `step600: `, or nothing."""
        return "" if self.name is None else f"{self.name}: "


def moments_of(options: ModelOptions) -> tuple[Moment, ...]:
    """The models that a `model:` section asks for, in the order of the config.

    A checkpoint is a folder, a folder within `model.id`, or a revision of it. `all` takes every shipped checkpoint
    of toy-induction, or every folder within `model.id` that holds a model, by the tokens seen where all their names say
    so, else by the last number in their names.

    Args:
        options: The section.

    Raises:
        UserError: `all` finds none, a name is none of a model's that has no revisions, the config files say that they
            are different models, or a revision is given too.
    """
    if options.checkpoints is None:
        return (Moment(None, None, options),)
    if options.revision is not None:
        raise UserError("model.revision: is given together with model.checkpoints", "Keep one of the two.")
    if options.id == "toy-induction":
        return _of_toy(options)
    names = _folders(options.id) if options.checkpoints == "all" else options.checkpoints
    moments = tuple(_moment(place, name, options) for place, name in enumerate(names))
    _compare_configs(moments)
    return moments


def last_of(moments: Sequence[Moment]) -> Moment:
    """The end of the training: the most tokens seen where they are known of all and differ, else the last listed.

    Args:
        moments: In the order of the config; at least one.
    """
    seen = [moment.tokens_seen for moment in moments]
    if None in seen or len(set(seen)) < len(seen):
        return moments[-1]
    return max(moments, key=lambda moment: moment.tokens_seen or 0)


def _of_toy(options: ModelOptions) -> tuple[Moment, ...]:
    from mechinterp_cli.models import toy

    seen = {checkpoint.revision: checkpoint.tokens for checkpoint in toy.checkpoints()}
    names = tuple(seen) if options.checkpoints == "all" else options.checkpoints or ()
    for place, name in enumerate(names):
        if name not in seen:
            problem = f"model.checkpoints[{place}]: toy-induction has no checkpoint {name!r}"
            raise UserError(problem, f"It has: {', '.join(seen)}.")
    return tuple(Moment(name, seen[name], _alone(options, revision=name)) for name in names)


def _alone(options: ModelOptions, **changes: str) -> ModelOptions:
    return options.model_copy(update={"checkpoints": None, **changes})


def _folders(model: str) -> tuple[str, ...]:
    found = _models_within(Path(model).expanduser())
    if not found:
        problem = f"model.checkpoints: all needs a local folder that holds folders of models, {model} is none"
        raise UserError(problem, "List the checkpoints: their folders, or revisions of the Hugging Face id.")
    return found


def _models_within(root: Path) -> tuple[str, ...]:
    """Folders that hold a model, in the order of training."""
    found = [path.name for path in root.iterdir() if (path / "config.json").is_file()] if root.is_dir() else []
    counted = all(_TOKENS_IN_NAME.search(name) for name in found)
    return tuple(sorted(found, key=lambda name: (_tokens_seen(name, None) if counted else _number(name), name)))


def _number(name: str) -> int:
    match = _LAST_NUMBER.search(name)
    return int(match[1]) if match else -1


def _moment(place: int, name: str, options: ModelOptions) -> Moment:
    root = Path(options.id).expanduser()
    for folder in (root / name, Path(name).expanduser()):
        if folder.is_dir():
            return Moment(name, _tokens_seen(name, folder), _alone(options, id=str(folder)))
    if root.is_dir():
        problem = f"model.checkpoints[{place}]: there is no folder {name}, neither in {options.id} nor by itself"
        there = _models_within(root)
        raise UserError(problem, f"{options.id} holds {', '.join(there) or 'no folders of models'}.")
    if find_entry(options.id) is not None or root.suffix.lower() == ".gguf":
        problem = f"model.checkpoints[{place}]: {name} is no folder, and {options.id} has no revisions"
        raise UserError(problem, "Leave out model.checkpoints, or list folders of models.")
    return Moment(name, _tokens_seen(name, None), _alone(options, revision=name))


def _tokens_seen(name: str, folder: Path | None) -> int | None:
    """From the name (`stage1-step1000-tokens5B`), or from what transformers' Trainer leaves beside the weights."""
    if match := _TOKENS_IN_NAME.search(name):
        return int(match[1]) * _SCALES[match[2].upper()]
    state = None if folder is None else folder / "trainer_state.json"
    if state is None or not state.is_file():
        return None
    try:
        seen = json.loads(state.read_text(encoding="utf-8")).get("num_input_tokens_seen")
    except (ValueError, AttributeError, OSError):
        return None
    # The Trainer writes 0 where it was not asked to count.
    return int(seen) if isinstance(seen, int | float) and seen > 0 else None


_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
          "n_layer", "n_embd", "n_head")  # fmt: skip


def _compare_configs(moments: Sequence[Moment]) -> None:
    """Compare what the config files of local folders say, before anything is loaded."""
    first: tuple[str | None, dict[str, object]] | None = None
    for place, moment in enumerate(moments):
        path = Path(moment.options.id) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            sizes = {key: config.get(key) for key in _SIZES}
        except (ValueError, AttributeError, OSError):
            continue  # loading it says what is wrong with it
        first = first or (moment.name, sizes)
        for key in _SIZES:
            if sizes[key] != first[1][key]:
                raise _other(place, moment.name, f"{key} {sizes[key]}", first[0], f"{first[1][key]}")


def check_same(place: int, moment: Moment, model: LoadedModel, name: str | None, first: LoadedModel) -> None:
    """Check that a later checkpoint is the same architecture with the same tokenizer as the first.

    Args:
        place: Which of the checkpoints it is.
        moment: The later one.
        model: Its model.
        name: The first one's name.
        first: The first one's model.

    Raises:
        UserError: Anatomy or tokenizer differ; says in what.
    """
    here, there = _facts(model.anatomy), _facts(first.anatomy)
    for key, value in here.items():
        if value != there[key]:
            raise _other(place, moment.name, f"{key} {value}", name, str(there[key]))
    if model.source.tokenizer_sha256 != first.source.tokenizer_sha256:
        raise _other(place, moment.name, "another tokenizer", name, "its own")


def _facts(anatomy: Anatomy) -> dict[str, object]:
    return {
        "number of layers": anatomy.n_layers,
        "d_model": anatomy.d_model,
        "vocabulary": anatomy.vocab_size,
        "heads": [None if layer.heads is None else (layer.heads.query, layer.heads.key_value, layer.heads.d_head)
                  for layer in anatomy.layers],
        "MLP width": [layer.d_mlp for layer in anatomy.layers],
        "sites": [layer.sites for layer in anatomy.layers],
        "causal": anatomy.causal,
    }  # fmt: skip


def _other(place: int, name: str | None, has: str, first: str | None, theirs: str) -> UserError:
    problem = f"model.checkpoints[{place}]: {name} has {has}, and {first} has {theirs}"
    return UserError(problem, "Checkpoints are moments of one training: list those of one model.")
