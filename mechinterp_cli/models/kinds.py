"""The kinds of site: the places in a decoder that can be read and edited, by their names in the field.

Names follow TransformerLens, so that nobody has to learn new ones; `q` and `k` are taken as they enter
attention, that is after rotary embedding (`rot_q`, `rot_k` there).
"""

RESIDUAL_KINDS = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""One vector of d_model features per token."""

HEAD_KINDS = ("q", "k", "v", "z")
"""heads × d_head features per token; `k` and `v` count key/value heads."""

KEY_KINDS = ("scores", "pattern")
"""heads × keys features per query token: before and after the softmax."""

NEURON_KINDS = ("neuron",)
"""d_mlp features per token: what enters the MLP's down projection."""

SITE_KINDS = RESIDUAL_KINDS + HEAD_KINDS + KEY_KINDS + NEURON_KINDS

INTERFACE_KINDS = ("q", "k", "v", "scores", "pattern")
"""Reached only through the attention function that a layer calls."""
