"""What every config section is made of, and the two registries that keep sections beside their code.

A task declares its options as a `TaskOptions` subclass in its own module, a subcommand declares its
section as a `MethodOptions` subclass in its own module; both register themselves by being defined.
So this room knows no task and no method, and adding one touches no file here.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class BaseConfig(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TaskOptions(BaseConfig):
    """Options of one task, chosen by `task.name`.

    Subclasses set `task_name` and are found under it in `TaskOptions.registry`.
    """

    registry: ClassVar[dict[str, type["TaskOptions"]]] = {}
    task_name: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass under its task name."""
        if cls.task_name:
            TaskOptions.registry[cls.task_name] = cls


class MethodOptions(BaseConfig):
    """The section of one subcommand, chosen by the key's name in the YAML file."""

    registry: ClassVar[dict[str, type["MethodOptions"]]] = {}
    method_name: ClassVar[str] = ""
    own_metrics: ClassVar[tuple[str, ...]] = ()
    """What the method measures where that is not the user's choice (`metrics:`)."""

    @classmethod
    def default_metrics(cls, task: type[TaskOptions] | None) -> tuple[str, ...]:
        """What is measured where the config names nothing.

        Args:
            task: The class of the task's options; None where the config names no known task.
        """
        return cls.own_metrics or ("logit_diff",)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass under its subcommand."""
        if cls.method_name:
            MethodOptions.registry[cls.method_name] = cls
