import json

import pytest
from pydantic import ValidationError

from mechinterp_cli.config.base import MethodOptions, TaskOptions
from mechinterp_cli.config.jsonschema import experiment_schema
from mechinterp_cli.config.schema import EngineOptions, StatsOptions, memory_bytes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("70%", 700), ("100 %", 1000), ("0.5%", 5)]
    + [("4GB", 4 * 10**9), ("1.5 KiB", 1536), ("512mb", 512 * 10**6), (42, 42)]
    + [("7", 7)],
)  # fmt: skip
def test_memory_limit_in_bytes(limit: str | int, expected: int) -> None:
    assert memory_bytes(limit, free=1000) == expected
    assert EngineOptions(max_memory=limit).max_memory == limit


@pytest.mark.parametrize("limit", ["", "lots", "0%", "101%", "-1", "4 GBs", 0, -5, True, 1.5, None, "0GB"])
def test_bad_memory_limit_is_refused(limit: object) -> None:
    with pytest.raises(ValidationError):
        EngineOptions.model_validate({"max_memory": limit})


@pytest.mark.parametrize(
    "section",
    [{"bootstrap": -1}, {"bootstrap": 1.0}, {"ci": 0.0}, {"ci": "0.9"}, {"ci": float("nan")}, {"seed": -1}]
    + [{"smallest_effect": 0}, {"smallest_effect": float("inf")}, {"correction": "bonferroni"}, {"bootstrap": True}]
    + [{"seed": 2**32}],
)  # fmt: skip
def test_bad_statistics_are_refused(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StatsOptions.model_validate(section)


def test_json_schema_is_self_contained() -> None:
    schema = experiment_schema()
    text = json.dumps(schema)
    assert "method" not in schema["properties"]
    assert {"name", "model", "task"} <= set(schema["required"])
    assert schema["additionalProperties"] is False
    for reference in [part.split('"')[0] for part in text.split('"#/$defs/')[1:]]:
        assert reference in schema["$defs"]
    assert schema["properties"]["stats"]["$ref"] or schema["properties"]["stats"]["allOf"]


def test_every_key_has_a_description() -> None:
    definition = experiment_schema()["$defs"]["EngineOptions"]
    assert all(prop.get("description") for prop in definition["properties"].values())


def test_what_was_imported_first_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.dumps(experiment_schema())
    for options in (TaskOptions, MethodOptions):
        monkeypatch.setattr(options, "registry", dict(reversed(options.registry.items())))
    assert json.dumps(experiment_schema()) == before
