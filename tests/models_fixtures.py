"""Models as fixtures (import them into a test module, or register this file in conftest), and loading helpers."""

import pytest

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import ExitCode, UserError
from mechinterp_cli.models import zoo
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel


@pytest.fixture(scope="session")
def toy() -> LoadedModel:
    """`toy-induction`, the finished model, eager attention."""
    return load_model(ModelOptions(id="toy-induction", device="cpu", attn_implementation="eager"))


@pytest.fixture(scope="session")
def planted() -> LoadedModel:
    """`planted-induction`, eager attention."""
    return load_model(ModelOptions(id="planted-induction", device="cpu", attn_implementation="eager"))


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """`smollm2-135m-instruct`, fetched first where it is not at hand."""
    zoo.fetch("smollm2-135m-instruct")
    return load_model(ModelOptions(id="smollm2-135m-instruct", device="cpu"))


def options(model_id: object, **others: object) -> ModelOptions:
    return ModelOptions.model_validate({"id": str(model_id), "device": "cpu", **others})


def refused(chosen: ModelOptions) -> UserError:
    with pytest.raises(UserError) as caught:
        load_model(chosen)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value
