"""Named decoder families as tiny random models of three layers: what the engine's tests run on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from benchmarks.tiny import tiny_model

WINDOW = 5
"""Width of the sliding window of the families that have one; prompts of tests must be longer."""

PARALLEL = frozenset({"resid_mid"})
EXPERTS = frozenset({"neuron"})
BYPASS = frozenset({"q", "k", "v", "scores", "pattern"})
NO_ATTENTION = BYPASS | PARALLEL | EXPERTS | {"attn_out", "mlp_out", "z"}


@dataclass(frozen=True)
class Family:
    """A decoder family and what is special about it."""

    model_type: str
    attention: str
    """The attention implementation that transformers chooses by default."""
    note: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    """Kinds of site that no layer is expected to declare."""
    partly: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Kinds of site to the layers that are expected not to declare them, where others do."""
    executor: str = "packed"
    """The executor that is expected to prove itself."""
    layers: int = 3


FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", "sdpa", "learned positions, fused qkv as Conv1D"),
    "gpt_neox": Family("gpt_neox", "sdpa", "parallel block, partial rotary, fused qkv", lacks=PARALLEL),
    "gptj": Family(
        "gptj", "eager", "parallel block; attention bypasses the interface", lacks=PARALLEL | BYPASS, executor="resume"
    ),
    "opt": Family("opt", "sdpa", "learned positions with an offset of 2; no MLP module"),
    "bloom": Family("bloom", "eager", "ALiBi; attention bypasses the interface", lacks=BYPASS, executor="resume"),
    "falcon": Family(
        "falcon",
        "sdpa",
        "parallel block, one key/value head; attention bypasses the interface",
        lacks=PARALLEL | BYPASS,
        executor="resume",
    ),
    "llama": Family("llama", "sdpa", "sequential block, rotary, grouped queries"),
    "mistral": Family("mistral", "sdpa", "a sliding window in every layer", {"sliding_window": WINDOW}),
    "mixtral": Family("mixtral", "sdpa", "mixture of experts, no window", {"sliding_window": None}, lacks=EXPERTS),
    "qwen2": Family("qwen2", "sdpa", "biases on q, k and v"),
    "qwen3": Family("qwen3", "sdpa", "norms on q and k"),
    "gemma": Family("gemma", "sdpa", "scaled embedding, norms centred at zero"),
    "gemma2": Family(
        "gemma2",
        "eager",
        "post-norms, soft-caps on scores and logits, alternating window",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": Family("gemma3_text", "sdpa", "a rotary per layer type, alternating window", {"sliding_window": WINDOW}),
    "phi": Family("phi", "sdpa", "parallel block, partial rotary, biases", lacks=PARALLEL),
    "phi3": Family("phi3", "sdpa", "fused qkv and fused gate, a window in every layer", {"sliding_window": WINDOW}),
    "olmo2": Family("olmo2", "sdpa", "norms after attention and MLP, not before"),
    "cohere": Family("cohere", "sdpa", "parallel block, logit scale", lacks=PARALLEL),
    "stablelm": Family("stablelm", "sdpa", "sequential block, layer norm, partial rotary"),
    "gpt_oss": Family(
        "gpt_oss", "eager", "sinks, mixture of experts, alternating window", {"sliding_window": WINDOW}, lacks=EXPERTS
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "sdpa",
        "latent attention: values narrower than keys; experts above layer 0",
        partly={"neuron": (1, 2)},
    ),
    "mamba": Family("mamba", "none", "no attention at all", lacks=NO_ATTENTION, executor="resume"),
    "granite": Family(
        "granite",
        "sdpa",
        "multipliers on the embedding, the attention, the residual and the logits",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.5, "logits_scaling": 0.7},
    ),
    "qwen3_next": Family(
        "qwen3_next",
        "sdpa",
        "linear attention around one layer of gated softmax attention",
        lacks=EXPERTS,
        partly=dict.fromkeys(sorted(BYPASS | {"z"}), (0, 2)),
        executor="resume",
    ),
    "deepseek_v32": Family(
        "deepseek_v32",
        "sdpa",
        "latent attention with a learned sparse mask",
        {"index_topk": 6},
        partly={"neuron": (1, 2)},
        executor="resume",
    ),
}
"""The families by name."""


def build(name: str, *, seed: int = 0, attn_implementation: str | None = None) -> PreTrainedModel:
    """Build a family's tiny model: float32, evaluation mode, no gradients.

    Args:
        name: A key of `FAMILIES`.
        seed: Of the weights.
        attn_implementation: `eager` or `sdpa`; the family's default when None.

    Returns:
        The model. Draw prompts with `benchmarks.tiny.tiny_tokens`.
    """
    family = FAMILIES[name]
    return tiny_model(
        family.model_type,
        seed=seed,
        layers=family.layers,
        overrides=family.overrides,
        attn_implementation=attn_implementation,
    )
