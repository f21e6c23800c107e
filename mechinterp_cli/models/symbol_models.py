"""Reading the two models that come with the package: no network, no cache."""

from typing import Any

from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models import planted, toy
from mechinterp_cli.models.checksum import sha256_of, sha256_of_tensors
from mechinterp_cli.models.quiet import quiet
from mechinterp_cli.models.read import ReadModel, pretrained_options, refuse_revision
from mechinterp_cli.models.symbols import load_tokenizer


def read_planted(options: ModelOptions) -> ReadModel:
    """Build `planted-induction`."""
    refuse_revision(options, "planted-induction is one set of weights")
    state = planted.planted_state()
    return ReadModel(
        model=_from_state(GPT2LMHeadModel, planted.planted_config(), state, options),
        tokenizer=load_tokenizer(planted.POSITIONS),
        path="zoo",
        weight_files={"mechinterp_cli.models.planted": sha256_of_tensors(state)},
    )


def read_toy(options: ModelOptions) -> ReadModel:
    """Read a checkpoint of `toy-induction`; the last one unless `model.revision` names another.

    Raises:
        UserError: There is no such checkpoint.
    """
    checkpoints = {checkpoint.revision: checkpoint for checkpoint in toy.checkpoints()}
    revision = options.revision or list(checkpoints)[-1]
    if revision not in checkpoints:
        raise UserError(
            f"model.revision: toy-induction has no checkpoint {revision!r}", f"It has: {', '.join(checkpoints)}."
        )
    path = checkpoints[revision].file
    return ReadModel(
        model=_from_state(LlamaForCausalLM, toy.toy_config(), load_file(path), options),
        tokenizer=load_tokenizer(toy.POSITIONS),
        path="zoo",
        weight_files={path.name: sha256_of(path)},
        revision=revision,
    )


def _from_state(
    kind: type[PreTrainedModel], config: PretrainedConfig, state: dict[str, Any], options: ModelOptions
) -> PreTrainedModel:
    # from_pretrained and not `.to(dtype)`: it leaves the rotary frequencies in float32, as for any other model.
    with quiet():
        return kind.from_pretrained(None, config=config, state_dict=state, **pretrained_options(options))
