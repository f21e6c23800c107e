"""Direct attribution and the lens on models and prompts of a test's own, with what they note and warn of."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechinterp_cli.methods.attribute.direct import check_direct, direct_tables
from mechinterp_cli.methods.attribute.lens import check_lens, lens_tables
from mechinterp_cli.methods.attribute.options import AttributeOptions
from mechinterp_cli.methods.bench import Bench, Tally
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.checkpoints import Moment
from mechinterp_cli.models.loaded import LoadedModel, ModelSource
from mechinterp_cli.runs.outcome import SilentProgress
from mechinterp_cli.runs.recorder import record
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from tests.experiments import config_of
from tests.families import build
from tests.task_tokenizers import symbols

importlib.import_module("mechinterp_cli.methods.attribute.columns")  # registers the tables

LOW, HIGH = 5, 60
"""Ids of ordinary tokens of every tiny model and of the toy."""


@dataclass(frozen=True, eq=False)
class Told:
    """What one call left behind."""

    tables: dict[str, pd.DataFrame]
    """As the run would write them, null as None-like values."""
    notes: dict[str, Any]
    """Put into the manifest."""
    warnings: list[str]


def tiny(name: str, **others: Any) -> LoadedModel:
    """A family's tiny model."""
    model = build(name, **others)
    return LoadedModel(model, symbols(), find_anatomy(model), ModelSource(name, "zoo", None))


def prompt(
    length: int, seed: int, *, answers: int = 1, group: str = "", cluster: str = "", wrong: bool = True
) -> Prompt:
    """Random tokens with an answer; spans `first` (two tokens), `pair` (which overlaps it), `end`."""
    ids = torch.randint(LOW, HIGH, (length + answers + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(
        clean="",
        clean_tokens=tuple(ids[:length]),
        answer=tuple(ids[length : length + answers]),
        answer_text="",
        wrong_answer=(ids[-1] + 1,) if wrong else (),
        spans={"first": (0, 1), "pair": (1, 2), "end": (length - 1,)},
        group=group,
        template=f"of {length}",
        cluster=cluster,
    )


def prompts_of(*prompts: Prompt) -> PromptSet:
    """Some prompts as a task's."""
    return PromptSet("made", prompts)


def setting_of(
    folder: Path, model: LoadedModel, prompts: PromptSet, section: dict[str, Any], **sections: Any
) -> Setting:
    """A setting for a config with this `attribute:` section, and others."""
    loaded = config_of(folder, section, method="attribute", **sections)
    return Setting(loaded, model, Moment(None, None, loaded.config.model), prompts, SilentProgress())


def options_of(setting: Setting) -> AttributeOptions:
    """The setting's section."""
    method = setting.loaded.config.method
    assert isinstance(method, AttributeOptions)
    return method


def told(folder: Path, model: LoadedModel, prompts: Sequence[Prompt], section: dict[str, Any], **sections: Any) -> Told:
    """Check and compute `direct` and `lens`, as far as the section has them."""
    setting = setting_of(folder, model, prompts_of(*prompts), section, **sections)
    options, config = options_of(setting), setting.loaded.config
    tables: dict[str, Any] = {}
    with record(setting.loaded, folder / "runs") as run:
        bench = Bench(run, model, config.engine, setting.moment, 0, 1, setting.progress, Tally())
        if options.direct is not None:
            check_direct(options.direct, setting)
            tables |= direct_tables(options.direct, setting, bench)
        if options.lens is not None:
            check_lens(options.lens, setting)
            tables |= lens_tables(options.lens, setting, bench)
        notes = run.manifest.engine["parts"]
        warnings = list(run.manifest.warnings)
    assert len(notes) == 1
    kept = {
        name: validate(name, data, "attribute").to_pandas(types_mapper=pd.ArrowDtype) for name, data in tables.items()
    }
    return Told(kept, notes[0], warnings)
