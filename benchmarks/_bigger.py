"""A random llama with the demo's tokenizer, for benchmarks that need a slower model."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, HEADS, KV, CONTEXT = 512, 1536, 8, 8, 4, 8192


def write_folder(folder: Path) -> Path:
    """An MLX folder in float32, 28M parameters; the same one each time."""
    from rl_mlx.convert import convert

    convert(str(files("rl_mlx.demo") / "demo.gguf"), folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("quantization", "quantization_config", "torch_dtype"):
        config.pop(name, None)
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": CONTEXT, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").unlink()
    save_file(_tensors(config["vocab_size"]), folder / "model.safetensors", {"format": "mlx"})
    return folder


def write_gguf(folder: Path) -> Path:
    """The same as a GGUF file beside the folder."""
    from rl_mlx.convert import export

    made = folder.with_suffix(".gguf")
    export(write_folder(folder), made)
    return made


def _tensors(vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    narrow = HIDDEN * KV // HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": rng.normal(0, 0.02, (vocab, HIDDEN))}
    found["model.embed_tokens.weight"][:3] = 0  # control tokens: greedy answers never end
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in shapes.items():
            found[f"{at}.{name}.weight"] = rng.normal(0, shape[1] ** -0.5, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = np.ones(HIDDEN)
    found["model.norm.weight"] = np.ones(HIDDEN)
    return {name: value.astype(np.float32) for name, value in found.items()}
