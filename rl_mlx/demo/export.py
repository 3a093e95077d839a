"""Trained weights as a Q8_0 GGUF file that any llama.cpp reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer

from rl_mlx.demo import vocab
from rl_mlx.demo.network import Shape, Weights


def export(
    path: Path, weights: Weights, shape: Shape, tokenizer: Tokenizer, name: str, description: str
) -> None:
    """Write matrices as Q8_0 and norms as F32; the metadata names no machine and no date."""
    writer = GGUFWriter(path, "llama")
    _describe(writer, shape, name, description)
    _add_tokenizer(writer, tokenizer)
    for tensor_name in sorted(weights):
        data = np.array(weights[tensor_name], dtype=np.float32)
        if data.ndim == 1:
            writer.add_tensor(tensor_name, data)
        else:
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor_name, quantize(data, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, shape: Shape, name: str, description: str) -> None:
    writer.add_name(name)
    writer.add_author("rl-mlx")
    writer.add_license("apache-2.0")
    writer.add_description(description)
    writer.add_languages(["en"])
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(2)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    tokens, merges = vocab.tokens_and_merges(tokenizer)
    special = [TokenType.CONTROL if t in vocab.SPECIAL else TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.PRE)
    writer.add_token_list(tokens)
    writer.add_token_types(special)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index(vocab.END))
    writer.add_pad_token_id(tokens.index(vocab.PAD))
    writer.add_add_bos_token(value=False)
    writer.add_chat_template(vocab.CHAT_TEMPLATE)
