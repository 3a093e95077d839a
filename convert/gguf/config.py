"""GGUF metadata as a Hugging Face style config, fit for our decoder and mlx-lm's ``ModelArgs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.families.words import layer_types, read_dense, read_windows
from rl_mlx.convert.family import RMS_NORM
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.rope import rope_parameters
from rl_mlx.convert.hfconfig import bilingual
from rl_mlx.errors import FormatError, UnsupportedModel

Fields = dict[str, Any]


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The config of ``file``, in both dialects of ``hfconfig``.

    Raises ``UnsupportedModel`` for an architecture that is none of ours, and ``FormatError`` where
    a key is missing or cannot be right.
    """
    kind = file.str("general.type", "model")
    if kind != "model":
        raise FormatError(f"{file.paths[0]}: of the type {kind!r}, which is no model by itself")
    arch = file.str("general.architecture")
    readers = {**_ARCHITECTURES, **{f.architecture: (n, f.read) for n, f in FAMILIES.items()}}
    if arch not in readers:
        raise UnsupportedModel(
            f"{file.paths[0]}: architecture {arch!r} is not supported on MLX; "
            "try --backend llama.cpp"
        )
    name, fields = readers[arch]
    keys = Keys(file, arch)
    config = _common(keys, name) | {"model_type": name} | fields(keys)
    config["architectures"] = [_class_name(config["model_type"])]
    return bilingual(config)


def _class_name(model_type: str) -> str:
    family = FAMILIES.get(model_type)
    return family.class_name if family else _CLASSES[model_type]


def _common(keys: Keys, model_type: str) -> Fields:
    file = keys.file
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(
            f"{keys.path}: tensor 'token_embd.weight' is missing or no matrix; "
            "this may be a vocabulary, an adapter or a projector, and no model"
        )
    if keys.layers > len(file.tensors):
        raise FormatError(
            f"{keys.path}: {keys.layers} blocks are not in {len(file.tensors)} tensors"
        )
    is_bare = keys.heads < 1 and keys.has("ssm.state_size")  # no attention at all
    if keys.heads < 1 and not is_bare:
        raise FormatError(f"{keys.path}: a model of {keys.heads} attention heads cannot be")
    if not file.bool(f"{keys.arch}.attention.causal", True):
        raise UnsupportedModel(
            f"{keys.path}: a model for embeddings, which sees what follows and generates no text"
        )
    latent = keys.has("attention.kv_lora_rank")
    if keys.count("attention.value_length", keys.head_dim) != keys.head_dim and not latent:
        raise UnsupportedModel(
            f"{keys.path}: values of another width than keys are not supported on MLX; "
            "try --backend llama.cpp"
        )
    family = FAMILIES.get(model_type)
    epsilon, key = family.epsilon if family else ("rms_norm_eps", RMS_NORM)
    config: Fields = {
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.hidden,
        "num_hidden_layers": keys.layers,
        "num_attention_heads": 1 if is_bare else keys.uniform("attention.head_count"),
        "head_dim": keys.head_dim,
        "max_position_embeddings": keys.count("context_length"),
        epsilon: keys.number(key),
        "rope_parameters": rope_parameters(file, keys.arch, keys.head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    for name in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{name}" in file.metadata:
            config[name] = file.int(f"tokenizer.ggml.{name}")
    return config


def _experts(keys: Keys) -> Fields:
    experts, used = keys.count("expert_count"), keys.count("expert_used_count")
    if used > experts:
        raise FormatError(f"{keys.path}: {used} experts of {experts} cannot be used")
    return {"num_local_experts": experts, "num_experts_per_tok": used}


def _llama(keys: Keys) -> Fields:
    if keys.file.int(f"{keys.arch}.rope.dimension_count", keys.head_dim) != keys.head_dim:
        raise UnsupportedModel(
            f"{keys.path}: {keys.arch} models that rotate a part of each head are not supported "
            "on MLX; try --backend llama.cpp"
        )
    fields = read_dense(keys)
    if keys.file.int(f"{keys.arch}.expert_count", 0):
        return fields | _experts(keys) | {"model_type": "mixtral"}
    for field, tensor in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_down")):
        fields[field] = f"blk.0.{tensor}.bias" in keys.file.tensors
    return fields


def _mistral3(keys: Keys) -> Fields:
    fields = _llama(keys)
    if not keys.has("attention.temperature_scale"):
        return fields
    # Queries grow with their position: Ministral 3.
    parameters = rope_parameters(keys.file, keys.arch, keys.head_dim)
    beta = keys.number("attention.temperature_scale")
    original = parameters.get("original_max_position_embeddings", keys.count("context_length"))
    parameters |= {
        "llama_4_scaling_beta": beta,
        "original_max_position_embeddings": original,
    }
    return fields | {"model_type": "ministral3", "rope_parameters": parameters}


def _qwen3_moe(keys: Keys) -> Fields:
    experts = _experts(keys)
    return {
        **_dense_or_experts(keys),
        **experts,
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _dense_or_experts(keys: Keys) -> Fields:
    """As ``_dense``, where files without dense layers may leave their width out."""
    fields = {"num_key_value_heads": keys.uniform("attention.head_count_kv", keys.heads)}
    inner = keys.count("expert_feed_forward_length")
    return fields | {"intermediate_size": keys.uniform("feed_forward_length", inner)}


def _gemma_scale(keys: Keys, largest: int) -> Fields:
    """Scores are divided by the root of this: the head's width, but not in the largest model.

    That one is known by its layers. Source: google/gemma_pytorch, config.py; no file says it.
    """
    if keys.has("attention.scale"):
        scale = keys.number("attention.scale")
        return {"query_pre_attn_scalar": scale**-2 if scale > 0 else keys.head_dim}
    own = keys.hidden // keys.heads if keys.layers == largest else keys.head_dim
    return {"query_pre_attn_scalar": own}


def _gemma2(keys: Keys) -> Fields:
    windows = read_windows(keys, 2)
    if windows["sliding_window"] is None:
        windows = {"sliding_window": 4096, "layer_types": layer_types(keys.layers, 2)}
    return {
        **read_dense(keys),
        **windows,
        **_gemma_scale(keys, 46),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        **_GELU,
    }


def _gemma3(keys: Keys) -> Fields:
    full = rope_parameters(keys.file, keys.arch, keys.head_dim, 1_000_000.0)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)}
    cap = keys.number("final_logit_softcapping", 0.0)
    return {
        **read_dense(keys),
        **read_windows(keys, 6),
        **_gemma_scale(keys, 62),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": cap or None,
        **_GELU,
    }


_GELU: Mapping[str, str] = MappingProxyType(
    {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
)


def _phi3(keys: Keys) -> Fields:
    fields = read_dense(keys) | {"sliding_window": None}
    if window := keys.file.int(f"{keys.arch}.attention.sliding_window", 0):
        fields["sliding_window"] = window  # the converter writes 0 for Phi 4, which has none
    if keys.has("rope.scaling.original_context_length"):
        original = keys.count("rope.scaling.original_context_length")
        fields["original_max_position_embeddings"] = original
    return fields


def _gpt_oss(keys: Keys) -> Fields:
    parameters = rope_parameters(keys.file, keys.arch, keys.head_dim)
    if parameters["rope_type"] == "yarn":
        parameters["truncate"] = False  # its config says so, and GGUF has no word for it
    return {
        **_experts(keys),
        **read_windows(keys, 2),
        "num_key_value_heads": keys.uniform("attention.head_count_kv", keys.heads),
        "intermediate_size": keys.count("expert_feed_forward_length"),
        "rope_parameters": parameters,
        "attention_bias": True,
        "swiglu_limit": 7.0,
    }


def _lfm2(keys: Keys) -> Fields:
    kv_heads = keys.per_layer("attention.head_count_kv", keys.heads)
    inner = keys.uniform("feed_forward_length")
    return {
        "num_key_value_heads": keys.positive("attention.head_count_kv", max(kv_heads)),
        "layer_types": ["full_attention" if n else "conv" for n in kv_heads],
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": keys.count("shortconv.l_cache"),
        "conv_bias": False,
        "intermediate_size": inner,
        "block_dim": keys.hidden,
        "block_ff_dim": inner,
        "block_auto_adjust_ff_dim": False,
    }


_ARCHITECTURES: Mapping[str, tuple[str, Callable[[Keys], Fields]]] = MappingProxyType(
    {
        "llama": ("llama", _llama),
        "internlm2": ("llama", _llama),
        "mistral3": ("mistral", _mistral3),
        "qwen2": ("qwen2", read_dense),
        "qwen3": ("qwen3", read_dense),
        "qwen3moe": ("qwen3_moe", _qwen3_moe),
        "gemma2": ("gemma2", _gemma2),
        "gemma3": ("gemma3_text", _gemma3),
        "phi3": ("phi3", _phi3),
        "gpt-oss": ("gpt_oss", _gpt_oss),
        "lfm2": ("lfm2", _lfm2),
    }
)
_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "ministral3": "Ministral3ForCausalLM",
        "mixtral": "MixtralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "lfm2": "Lfm2ForCausalLM",
    }
)
