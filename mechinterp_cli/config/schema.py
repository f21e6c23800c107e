"""One experiment: every section of the YAML file, with every default."""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mechinterp_cli.config.base import BaseConfig, MethodOptions, TaskOptions
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.config.types import Count, Flag, Fraction, Number, Seed, Slug, Text, unique

FEWEST_DRAWS = 199
"""Random sets from which on there is a p-value and a verdict."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


def memory_bytes(limit: str | int, free: int) -> int:
    """Give the number of bytes that a memory limit stands for.

    Args:
        limit: Bytes, `"70%"` of what is free, or a size such as `"4GB"` or `"512MiB"`.
        free: Bytes that are free now.

    Returns:
        The budget in bytes, at least 1.

    Raises:
        ValueError: The limit is none of these.
    """
    if isinstance(limit, int):
        size = float(limit)
    elif match := _PERCENT.fullmatch(limit):
        if not 0 < float(match[1]) <= 100:
            raise ValueError("a percentage lies above 0 and up to 100")
        size = free * float(match[1]) / 100
    elif (match := _SIZE.fullmatch(limit)) and match[2].upper() in _UNITS:
        size = float(match[1]) * _UNITS[match[2].upper()]
    else:
        raise ValueError("allowed: '70%' of free memory, a size such as '4GB' or '512MiB', or a number of bytes")
    if size <= 0:
        raise ValueError("the memory budget must be more than 0")
    return max(1, int(size))


def _memory_limit(value: Any, handler: ValidatorFunctionWrapHandler) -> str | int:
    """Refuse what `memory_bytes` cannot read; booleans are not sizes."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("allowed: '70%' of free memory, a size such as '4GB' or '512MiB', or a number of bytes")
    memory_bytes(value, free=100)
    accepted: str | int = handler(value)
    return accepted


MemoryLimit = Annotated[str | int, WrapValidator(_memory_limit)]
Names = Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(unique)]


class StatsOptions(BaseConfig):
    """How certainty is worked out."""

    bootstrap: Annotated[int, Field(strict=True, ge=100)] = 1000
    """Resamples for the intervals."""
    ci: Fraction = 0.95
    """Level of the intervals."""
    interval: Literal["studentized", "bca"] = "studentized"
    """How the intervals are made from the resamples."""
    smallest_effect: Annotated[Number, Field(gt=0)] = 0.02
    """The smallest normalised effect that matters; trials are reported against it."""
    seed: Seed = 0
    """Seed of resampling and of sign flips."""
    flips: Annotated[int, Field(strict=True, ge=99)] = 1999
    """Sign flips for p-values, where they are not all enumerated."""
    correction: Literal["max_t", "bh", "none"] = "max_t"
    """For many trials: Westfall-Young max-T, Benjamini-Hochberg, or none."""
    q: Fraction = 0.05
    """False discovery rate, for Benjamini-Hochberg."""
    denominator_relative: Annotated[Number, Field(ge=0)] = 0.05
    """Prompts whose clean and corrupt differ by less than this share of the median have no normalised effect."""
    denominator_absolute: Annotated[Number, Field(gt=0)] = 1e-3
    """... and so have prompts whose clean and corrupt differ by less than this, in the metric's own unit."""


class EngineOptions(BaseConfig):
    """How the forward passes are computed; results differ by rounding only."""

    executor: Literal["auto", "packed", "resume", "hooks"] = "auto"
    """`auto` takes the first that proves itself: packed wavefront, layer resume, plain hooks."""
    max_memory: MemoryLimit = "70%"
    """Budget of a work unit: a share of free memory, a size such as `4GB`, or bytes."""
    rows_per_call: Count | None = None
    """Rows (trial x prompt x position) in one matrix product; null takes the device's default."""
    proof_trials: Count = 4
    """Trials of each kind that are computed by plain hooks too, as a proof."""
    on_nan: Literal["error", "record"] = "error"
    """NaN or infinity in a result: stop and name the layer, or keep going and mark the rows."""


class OutputOptions(BaseConfig):
    """What is written, and where."""

    dir: Text = "runs"
    """Folder in which the run directory is made."""
    formats: (
        Literal["auto"] | Annotated[tuple[Literal["parquet", "csv"], ...], Field(min_length=1), AfterValidator(unique)]
    ) = "auto"
    """Formats of results and summary. Parquet keeps every type; `auto` adds CSV up to a million rows."""
    rows: Literal["all", "summary", "top"] = "all"
    """Every observation, none of them, or those of the strongest trials."""
    figures: Annotated[tuple[Literal["png", "svg", "pdf", "html"], ...], AfterValidator(unique)] = ("png", "html")
    """Formats of the pictures; `[]` draws none. `html` is `report.html`: all of them on one page, to be pointed at."""
    top: Count = 10
    """How many of the strongest trials are listed, and kept under `rows: top`."""


def _rejected(title: str, key: str, problem: str, value: Any, remedy: str = "") -> ValidationError:
    """An error at one key of a section, in the form pydantic passes on with its path; the fix, where one is known."""
    kind = PydanticCustomError("choice", "{problem}", {"problem": problem, "remedy": remedy})
    return ValidationError.from_exception_data(title, [InitErrorDetails(type=kind, loc=(key,), input=value)])


def task_class(section: dict[str, Any]) -> type[TaskOptions] | None:
    """Find the task that a section means.

    Args:
        section: The mapping under `task`. Without a `name`, a key that is itself a task's name decides
            (`prompts:`, `file:`).

    Returns:
        The options class, or None where no known task is meant.
    """
    name = section.get("name")
    if name is None:
        meant = [known for known in TaskOptions.registry if known in section]
        name = meant[0] if len(meant) == 1 else None
    return TaskOptions.registry.get(name) if isinstance(name, str) else None


def choose_task(section: Any) -> Any:
    """Read a task's section as the options that its `name` means."""
    if isinstance(section, TaskOptions):
        return section
    if not isinstance(section, dict):
        raise PydanticCustomError("choice", "allowed: a mapping with a `name`")
    chosen = task_class(section)
    if chosen is None:
        known = ", ".join(sorted(TaskOptions.registry))
        raise _rejected("task", "name", f"allowed: {known}", section.get("name"))
    if "name" in chosen.model_fields:
        return chosen.model_validate({"name": chosen.task_name, **section})
    return chosen.model_validate({key: value for key, value in section.items() if key != "name"})


def _choose_method(section: Any) -> Any:
    """Take `{"patch": {...}}`: the loader hands the one method section over under its own name."""
    if isinstance(section, MethodOptions):
        return section
    ((name, options),) = section.items()
    return MethodOptions.registry[name].model_validate({} if options is None else options)


class ExperimentConfig(BaseConfig):
    """One experiment: a model, a task, a method, and what is measured and written.

    In the YAML file the method's section stands under the subcommand's name (`patch:`).
    """

    name: Slug
    """Part of the run directory's name: letters, digits, `.`, `_`, `-`; at most 80 characters."""
    model: ModelOptions
    """Which model, and how it is loaded."""
    task: Annotated[SerializeAsAny[TaskOptions], BeforeValidator(choose_task)]
    """Which prompts, and what is asked of them."""
    method: Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_choose_method)]
    """What is done to the model."""
    metrics: Names = ("logit_diff",)
    """What is measured at the answer position."""
    stats: StatsOptions = StatsOptions()
    """How certainty is worked out."""
    engine: EngineOptions = EngineOptions()
    """How the forward passes are computed."""
    output: OutputOptions = OutputOptions()
    """What is written, and where."""
    deterministic: Flag = True
    """Only algorithms that give the same bits every time on the same machine."""

    @model_validator(mode="before")
    @classmethod
    def _own_metrics(cls, data: Any) -> Any:
        """Fill in a method's metrics, and refuse others where it leaves no choice."""
        section = data.get("method") if isinstance(data, dict) else None
        name = next(iter(section)) if isinstance(section, dict) and len(section) == 1 else ""
        method = MethodOptions.registry.get(name)
        if method is None:
            return data
        given = data.get("metrics", method.own_metrics)
        if method.own_metrics and (not isinstance(given, list | tuple) or tuple(given) != method.own_metrics):
            problem = f"{name} measures {', '.join(method.own_metrics)}, and nothing else can be chosen"
            raise _rejected("experiment", "metrics", problem, data["metrics"], "Leave the key out.")
        task = data.get("task")
        known = task_class(task) if isinstance(task, dict) else type(task) if isinstance(task, TaskOptions) else None
        return {"metrics": method.default_metrics(known), **data}

    @property
    def method_name(self) -> str:
        """The subcommand (`patch`)."""
        return type(self.method).method_name

    def resolved(self) -> dict[str, Any]:
        """Give the whole config with every default, as plain data in the layout of the YAML file."""
        data = self.model_dump(mode="json")
        data["task"] = {"name": type(self.task).task_name, **data["task"]}
        return {self.method_name if key == "method" else key: value for key, value in data.items()}

    @property
    def sha256(self) -> str:
        """Hash of the resolved config: equal for equal experiments, however the file was written."""
        text = json.dumps(self.resolved(), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
