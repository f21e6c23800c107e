"""What a subcommand supplies: an experiment on one model, checked before anything is computed."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.models.checkpoints import Moment
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.outcome import Progress
from mechinterp_cli.runs.schema import TableData
from mechinterp_cli.tasks.prompts import PromptSet

if TYPE_CHECKING:
    from mechinterp_cli.methods.bench import Bench

Tables = Mapping[str, TableData]
"""Table name to rows, as `runs.schema` knows the table."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What every method starts from.

    Args:
        loaded: The config.
        model: The model, one of its checkpoints where there are several.
        moment: Which of them it is.
        prompts: The task's prompts.
        progress: Where to tell.
        compute: Whether forward passes may be made (not by `--dry-run`).
    """

    loaded: LoadedConfig
    model: LoadedModel
    moment: Moment
    prompts: PromptSet
    progress: Progress
    compute: bool = True


class Experiment(ABC):
    """A method's experiment on one model; everything the user can get wrong has been checked.

    Args:
        setting: Config, model, prompts. The prompts are those that are left after dropping.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    def loaded(self) -> LoadedConfig:
        """The config."""
        return self.setting.loaded

    @property
    def model(self) -> LoadedModel:
        """The model."""
        return self.setting.model

    @property
    def prompts(self) -> PromptSet:
        """The prompts."""
        return self.setting.prompts

    @abstractmethod
    def seeds(self) -> dict[str, int]:
        """The method's own seeds by what they draw, for the manifest."""

    @abstractmethod
    def display(self) -> dict[str, str]:
        """What pictures say of the run: `title` and `scale`."""

    def facts(self) -> dict[str, Any]:
        """What belongs to the task's entry in the manifest, too."""
        return {}

    @abstractmethod
    def compute(self, bench: "Bench") -> Tables:
        """Compute everything, with the bench's engine, and give the tables."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What it will take, for `--dry-run`."""


Options = TypeVar("Options", bound=MethodOptions)
Prepare = Callable[[Options, Setting], Experiment]
_PREPARE: dict[type[MethodOptions], Prepare[Any]] = {}


def prepares(options: type[Options]) -> Callable[[Prepare[Options]], Prepare[Options]]:
    """Decorate the function that checks a method's section against model and prompts.

    Args:
        options: The section.

    Returns:
        A decorator that registers the function and gives it back unchanged.
    """

    def register(prepare: Prepare[Options]) -> Prepare[Options]:
        _PREPARE[options] = prepare
        return prepare

    return register


def experiment_of(setting: Setting) -> Experiment:
    """The experiment that a config asks for; the module that makes it is imported here, and torch with it.

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    method = setting.loaded.config.method
    importlib.import_module(f"mechinterp_cli.methods.{method.method_name}.experiment")
    return _PREPARE[type(method)](method, setting)
