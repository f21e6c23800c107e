"""The direct effect of each head on a task's answer (direct logit attribution; name movers, Wang et al. 2211.00593)."""

from collections.abc import Sequence

from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.direct_effects import DirectEffects, Paths
from mechinterp_cli.methods.direct_effects import direct_effects as effects_along
from mechinterp_cli.methods.heads.weights import Circuits
from mechinterp_cli.tasks.prompts import Prompt


def direct_effects(circuits: Circuits, prompts: Sequence[Prompt]) -> DirectEffects | str:
    """The direct effects of all components on prompts with an answer and a wrong answer.

    Args:
        circuits: The model's circuits.
        prompts: In the order of the result's first axis; their clean streams are used.

    Returns:
        The effects, or the reason why this model has none.

    Raises:
        UserError: A prompt has no answer or no wrong answer.
    """
    _check(prompts)
    unembedding = circuits.unembedding
    if isinstance(unembedding, str):
        return unembedding
    return effects_along(Paths(circuits.model, circuits.maps, unembedding), prompts)


def _check(prompts: Sequence[Prompt]) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt.answer or not prompt.wrong_answer:
            lacking = "wrong answer" if prompt.answer else "answer"
            raise UserError(
                f"heads.scores: direct_effect needs an answer and a wrong answer, and prompt {index} has no {lacking}",
                "Use a task whose prompts have both, or leave direct_effect out.",
            )
