"""The JSON Schema of a config file, with every task and method that is registered."""

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from mechinterp_cli.config.base import BaseConfig, MethodOptions, TaskOptions
from mechinterp_cli.config.schema import ExperimentConfig

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REF = "#/$defs/{model}"


def _task_branch(schema: dict[str, Any], task: str) -> dict[str, Any]:
    """One task's schema, with the `name` that chooses it."""
    properties = {"name": {"const": task, "description": "Chooses the task.", "type": "string"}}
    properties |= {key: value for key, value in schema.get("properties", {}).items() if key != "name"}
    branch = {**schema, "properties": properties}
    required = [key for key in schema.get("required", []) if key != "name"]
    # Without a name, a key that is itself a task's name chooses it (`prompts:`, `file:`).
    branch["required"] = required if task in properties else ["name", *required]
    return branch


def experiment_schema() -> dict[str, Any]:
    """Build the schema editors check and complete config files with.

    Returns:
        JSON Schema (draft 2020-12). Exactly one method section is required.
    """
    # In order of their names: what was imported first must not show.
    tasks = dict(sorted(TaskOptions.registry.items()))
    methods = dict(sorted(MethodOptions.registry.items()))
    models: list[type[BaseConfig]] = [ExperimentConfig, *tasks.values(), *methods.values()]
    refs, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    defs = definitions.get("$defs", {})
    resolve = {model: refs[(model, "validation")]["$ref"].removeprefix("#/$defs/") for model in models}
    top = defs.pop(resolve[ExperimentConfig])
    for task, chosen in tasks.items():
        defs[resolve[chosen]] = _task_branch(defs[resolve[chosen]], task)
    properties = dict(top["properties"])
    properties.pop("method")
    properties["task"] = {
        "description": properties["task"].get("description", ""),
        "anyOf": [{"$ref": f"#/$defs/{resolve[options]}"} for options in tasks.values()],
    }
    for method, options in methods.items():
        properties[method] = {"$ref": f"#/$defs/{resolve[options]}"}
    return {
        "$schema": _DIALECT,
        "title": "mechinterp experiment",
        "description": "One experiment; the method's section stands under the subcommand's name.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": [key for key in top["required"] if key != "method"],
        "oneOf": [{"required": [method]} for method in methods],
        "$defs": defs,
    }


def allowed_keys(schema: dict[str, Any], value: Any, path: tuple[str | int, ...]) -> list[str]:
    """List the keys that a section may have.

    Args:
        schema: What `experiment_schema` gives.
        value: The document as the file has it; its `kind`- and `name`-like constants narrow unions down.
        path: Path of the section.

    Returns:
        Valid keys, in schema order; empty where the schema says nothing.
    """
    found = branches(schema, schema, value)
    for step in path:
        value = _child(value, step)
        found = [
            inner for branch in found for raw in _schemas_below(branch, step) for inner in branches(schema, raw, value)
        ]
    return list(dict.fromkeys(key for branch in found for key in branch.get("properties", {})))


def _child(value: Any, step: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(step)
    return value[step] if isinstance(value, list) and isinstance(step, int) and step < len(value) else None


def _schemas_below(branch: dict[str, Any], step: str | int) -> list[dict[str, Any]]:
    if isinstance(step, int):
        items = branch.get("items")
        return [items] if isinstance(items, dict) else list(branch.get("prefixItems", []))
    below = branch.get("properties", {}).get(step, branch.get("additionalProperties"))
    return [below] if isinstance(below, dict) else []


def branches(top: Mapping[str, Any], schema: Mapping[str, Any], value: Any) -> list[dict[str, Any]]:
    """What a schema comes to: references and unions are followed.

    Args:
        top: The whole document, which holds the definitions.
        schema: Part of it.
        value: What stands there; branches whose constants it contradicts are left out.

    Returns:
        Schemas that are neither references nor unions.
    """
    if "$ref" in schema:
        return branches(top, top["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    unions = [*schema.get("anyOf", []), *(schema.get("oneOf", []) if "properties" not in schema else [])]
    found = [inner for branch in unions for inner in branches(top, branch, value)]
    if not unions and not _contradicts(schema, value):
        found.append(dict(schema))
    return found


def _contradicts(schema: Mapping[str, Any], value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    constants = {key: inner["const"] for key, inner in schema.get("properties", {}).items() if "const" in inner}
    return any(key in value and value[key] != constant for key, constant in constants.items())
