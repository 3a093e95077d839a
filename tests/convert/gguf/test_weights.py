"""GGUF files in canonical names, against mlx-lm's modules, Hugging Face's tensors and gguf-py."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.weights import Dense, Packed
from rl_mlx.errors import FormatError

PARITY = [
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "lfm2",
    "llama",
    "llama3-rope",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
]
RIGHT_IN_MLX_LM = sorted(set(PARITY) - {"gemma2", "gpt_oss"})  # no windows, YaRN truncated
QUANTS = ["IQ4_XS", "Q2_K", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M", "Q5_0", "Q5_1"]
QUANTS += ["Q5_K_M", "Q6_K", "Q8_0", "TQ2_0"]
HEADS, DIM = 4, 16  # of the tiny model


def shapes(weights):
    return {name: weights.shape(name) for name in weights.names()}


def held(tensor):
    if isinstance(tensor, Dense):
        return tensor.array.nbytes
    return sum(a.nbytes for a in (tensor.weight, tensor.scales, tensor.biases) if a is not None)


def interleaved(rows, heads):
    """What llama.cpp's converter does to rows of Q and K."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.shared
@pytest.mark.parametrize("name", PARITY)
def test_names_and_shapes_are_what_mlx_lm_expects(shared, mlx_shapes, name):
    weights = open_weights(shared / "parity" / f"{name}.gguf")
    assert shapes(weights) == mlx_shapes(weights.config)
    for tensor in weights.names():
        loaded = weights.load(tensor)
        assert loaded.shape == weights.shape(tensor)
        assert held(loaded) == weights.nbytes(tensor)


@pytest.mark.shared
@pytest.mark.parametrize("name", RIGHT_IN_MLX_LM)
def test_logits_through_mlx_lm_are_those_of_transformers(shared, mlx_model, values, name):
    weights = open_weights(shared / "parity" / f"{name}.gguf")
    model = mlx_model(weights.config)
    arrays = [(n, mx.array(values(weights.load(n)))) for n in weights.names()]
    model.load_weights(arrays, strict=False)
    reference = np.load(shared / "parity" / f"{name}.npz")
    logits = np.array(model(mx.array(reference["ids"].reshape(1, -1))))[0]
    expected = reference["logits"].reshape(logits.shape)
    assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2", "llama3-rope", "qwen3_moe"])
def test_a_file_and_a_folder_of_one_model_are_the_same(shared, values, name):
    file = open_weights(shared / "parity" / f"{name}.gguf")
    folder = open_weights(shared / "hf" / name)
    assert isinstance(file, GGUFWeights)
    assert isinstance(folder, FolderWeights)
    assert shapes(file) == shapes(folder)
    for tensor in folder.names():
        found, expected = values(file.load(tensor)), values(folder.load(tensor))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)  # float16's rounding
    # The folder holds keys that no GGUF has a word for; what both say, they say alike.
    ignored = {"num_key_value_heads_per_layer", "rope_scaling"}
    both = set(file.config) & set(folder.config) - ignored
    assert {key: file.config[key] for key in both} == {key: folder.config[key] for key in both}


@pytest.mark.shared
@pytest.mark.parametrize("name", QUANTS)
def test_quantized_files_dequantize_as_gguf_py_does(shared, values, name):
    path = shared / "quants" / f"qwen3-{name}.gguf"
    weights = open_weights(path)
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    exact = {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "TQ2_0"}
    seen = set()
    for tensor, source in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.2.mlp.down_proj.weight": "blk.2.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.q_norm.weight": "blk.0.attn_q_norm.weight",
    }.items():
        kind = raw[source].tensor_type
        loaded = weights.load(tensor)
        expected = gguf.quants.dequantize(raw[source].data, kind).reshape(loaded.shape)
        found = values(loaded)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= (1e-6 if kind.name in exact else 0.1), (tensor, kind.name)
        assert held(loaded) == weights.nbytes(tensor)
        seen.add(kind.name)
    assert seen - {"F32"}


QTYPE = gguf.GGMLQuantizationType


@pytest.mark.parametrize("arch", ["llama", "mistral3"])
@pytest.mark.parametrize("kind", [None, QTYPE.F16, QTYPE.BF16, QTYPE.Q8_0, QTYPE.Q4_0, QTYPE.Q5_1])
def test_q_and_k_are_unpermuted_in_any_type(make_gguf, llama_tensors, values, arch, kind):
    names = {"q_proj": ("attn_q", HEADS), "k_proj": ("attn_k", 2)}
    stored = dict(llama_tensors)
    for source, heads in names.values():
        name = f"blk.1.{source}.weight"
        stored[name] = interleaved(llama_tensors[name], heads)
    types = {f"blk.1.{source}.weight": kind for source, _ in names.values() if kind is not None}
    weights = GGUFWeights(make_gguf(arch, stored, types=types))
    for module, (source, _) in names.items():
        loaded = weights.load(f"model.layers.1.self_attn.{module}.weight")
        expected = llama_tensors[f"blk.1.{source}.weight"]
        if kind is not None:  # rows are quantized one by one, so their order does not matter
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
            assert isinstance(loaded, Dense if kind in (QTYPE.F16, QTYPE.BF16) else Packed)
        np.testing.assert_array_equal(values(loaded), expected)


def test_biases_of_q_and_k_are_unpermuted(make_gguf, llama_tensors, mlx_shapes, values):
    rng = np.random.default_rng(1)
    stored, biases = dict(llama_tensors), {}
    for i in range(2):
        for source, heads in (
            ("attn_q", 4),
            ("attn_k", 2),
            ("attn_v", None),
            ("attn_output", None),
        ):
            count = llama_tensors[f"blk.{i}.{source}.weight"].shape[0]
            bias = biases[source, i] = rng.standard_normal(count).astype(np.float32)
            stored[f"blk.{i}.{source}.bias"] = interleaved(bias, heads) if heads else bias
        for source in ("ffn_gate", "ffn_up", "ffn_down"):
            count = llama_tensors[f"blk.{i}.{source}.weight"].shape[0]
            stored[f"blk.{i}.{source}.bias"] = rng.standard_normal(count).astype(np.float32)
    weights = GGUFWeights(make_gguf(tensors=stored))
    assert weights.config["attention_bias"] is True
    assert weights.config["mlp_bias"] is True
    assert shapes(weights) == mlx_shapes(weights.config)
    at = "model.layers.1.self_attn."
    for source, module in (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"), ("attn_output", "o")):
        found = values(weights.load(f"{at}{module}_proj.bias"))
        np.testing.assert_array_equal(found, biases[source, 1])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_other_architectures_are_not_permuted(make_gguf, llama_tensors, values, arch):
    rng = np.random.default_rng(2)
    for i in range(2):
        for source, count in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            extra = {
                "qwen2": {f"blk.{i}.{source}.bias": rng.standard_normal(count)},
                "qwen3": {f"blk.{i}.{source}_norm.weight": rng.standard_normal(DIM)},
            }[arch]
            llama_tensors |= {
                n: a.astype(np.float32) for n, a in extra.items() if "v_norm" not in n
            }
    weights = GGUFWeights(make_gguf(arch, llama_tensors))
    found = values(weights.load("model.layers.0.self_attn.q_proj.weight"))
    np.testing.assert_array_equal(found, llama_tensors["blk.0.attn_q.weight"])


def test_gemma_norms_lose_the_one_that_was_added(make_gguf, llama_tensors, mlx_shapes, values):
    stored = dict(llama_tensors)
    for i in range(2):
        for name in ("post_attention_norm", "post_ffw_norm"):
            stored[f"blk.{i}.{name}.weight"] = llama_tensors[f"blk.{i}.attn_norm.weight"]
    own = {n: a / 4 for n, a in stored.items() if n.endswith("norm.weight")}
    stored |= {n: a + np.float32(1) for n, a in own.items()}
    weights = GGUFWeights(make_gguf("gemma2", stored))
    assert shapes(weights) == mlx_shapes(weights.config)
    for name, source in (
        ("model.norm", "output_norm"),
        ("model.layers.0.input_layernorm", "blk.0.attn_norm"),
        ("model.layers.1.post_attention_layernorm", "blk.1.post_attention_norm"),
        ("model.layers.1.pre_feedforward_layernorm", "blk.1.ffn_norm"),
        ("model.layers.1.post_feedforward_layernorm", "blk.1.post_ffw_norm"),
    ):
        found = values(weights.load(f"{name}.weight"))
        np.testing.assert_allclose(found, own[f"{source}.weight"], atol=1e-7)
        np.testing.assert_array_equal(found + np.float32(1), stored[f"{source}.weight"])


def test_gpt_oss_experts_in_mxfp4(make_gguf, llama_tensors, mlx_shapes, values):
    rng = np.random.default_rng(3)

    def weight(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    stored, types = {"output.weight": weight(40, 64)}, {}
    for name, array in llama_tensors.items():
        if ".ffn_" not in name:
            stored[name] = array
    for i in range(2):
        at = f"blk.{i}."
        for source, count in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
            stored[f"{at}{source}.bias"] = weight(count)
        stored[f"{at}attn_sinks.weight"] = weight(4)
        stored[f"{at}post_attention_norm.weight"] = weight(64)
        stored[f"{at}ffn_gate_inp.weight"], stored[f"{at}ffn_gate_inp.bias"] = (
            weight(3, 64),
            weight(3),
        )
        for source, rows, columns in (("gate", 96, 64), ("up", 96, 64), ("down", 64, 96)):
            stored[f"{at}ffn_{source}_exps.weight"] = weight(3, rows, columns)
            stored[f"{at}ffn_{source}_exps.bias"] = weight(3, rows)
            types[f"{at}ffn_{source}_exps.weight"] = QTYPE.MXFP4
    keys = {
        "expert_count": 3,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
        "attention.sliding_window": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 64,
    }
    weights = GGUFWeights(make_gguf("gpt-oss", stored, keys, types))
    assert shapes(weights) == mlx_shapes(weights.config)
    for module, source in (("gate_proj", "gate"), ("down_proj", "down")):
        loaded = weights.load(f"model.layers.1.mlp.experts.{module}.weight")
        assert loaded.mode == "mxfp4"
        array = stored[f"blk.1.ffn_{source}_exps.weight"]
        packed = gguf.quants.quantize(array, QTYPE.MXFP4)
        expected = gguf.quants.dequantize(packed, QTYPE.MXFP4)
        np.testing.assert_array_equal(values(loaded), expected)


def phi3_tensors(tensors):
    rng = np.random.default_rng(4)
    stored = {
        n: a for n, a in tensors.items() if not any(m in n for m in ("attn_q", "attn_k", "attn_v"))
    }
    for i in range(2):
        parts = [tensors[f"blk.{i}.attn_{n}.weight"] for n in "qkv"]
        stored[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)
        gate, up = stored.pop(f"blk.{i}.ffn_gate.weight"), stored[f"blk.{i}.ffn_up.weight"]
        stored[f"blk.{i}.ffn_up.weight"] = np.concatenate([gate, up])
    stored["output.weight"] = rng.standard_normal((40, 64)).astype(np.float32)
    return stored


def test_phi3_stays_fused(make_gguf, llama_tensors, mlx_shapes, values):
    stored = phi3_tensors(llama_tensors)
    long, short = np.linspace(1, 40, 6, dtype=np.float32), np.linspace(1, 2, 6, dtype=np.float32)
    stored |= {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    keys = {
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": 1.19,
        "attention.sliding_window": 0,
    }
    weights = GGUFWeights(make_gguf("phi3", stored, keys))
    assert shapes(weights) == mlx_shapes(weights.config)
    assert weights.config["partial_rotary_factor"] == 0.75
    scaling = weights.config["rope_scaling"]
    np.testing.assert_allclose(scaling["long_factor"], long, rtol=1e-7)
    np.testing.assert_allclose(scaling["short_factor"], short, rtol=1e-7)
    assert (scaling["type"], scaling["attention_factor"]) == ("longrope", 1.19)
    assert weights.config["original_max_position_embeddings"] == 64
    assert weights.config["sliding_window"] is None
    fused = values(weights.load("model.layers.1.self_attn.qkv_proj.weight"))
    np.testing.assert_array_equal(fused, stored["blk.1.attn_qkv.weight"])


@pytest.mark.shared
def test_lfm2_files_have_had_two_names_for_the_last_norm(shared, make_gguf, values):
    source = GGUFFile.open(shared / "parity" / "lfm2.gguf")
    stored = {n: source.raw(n).view(np.float32) for n, t in source.tensors.items() if t.type == 0}
    stored |= {n: source.raw(n).view(np.float16) for n, t in source.tensors.items() if t.type == 1}
    norm = stored["output_norm.weight"] = stored.pop("token_embd_norm.weight")
    keys = {
        "block_count": 4,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count_kv": [0, 2, 0, 2],
        "shortconv.l_cache": 3,
    }
    weights = GGUFWeights(make_gguf("lfm2", stored, keys))
    np.testing.assert_array_equal(values(weights.load("model.embedding_norm.weight")), norm)
    kernel = weights.load("model.layers.0.conv.conv.weight").array
    np.testing.assert_array_equal(kernel[..., 0], stored["blk.0.shortconv.conv.weight"])


def test_an_explicit_head_is_kept_even_where_it_equals_the_embedding(make_gguf, llama_tensors):
    assert "lm_head.weight" not in GGUFWeights(make_gguf()).names()
    llama_tensors["output.weight"] = llama_tensors["token_embd.weight"]
    weights = GGUFWeights(make_gguf(tensors=llama_tensors))
    assert weights.config["tie_word_embeddings"] is False
    assert weights.shape("lm_head.weight") == (40, 64)


def test_factors_that_no_config_says_are_a_tensor(make_gguf, llama_tensors, values):
    divisors = np.linspace(1, 3, 8, dtype=np.float32)
    weights = GGUFWeights(make_gguf(tensors=llama_tensors | {"rope_freqs.weight": divisors}))
    assert weights.config["rope_parameters"]["rope_type"] == "default"
    np.testing.assert_array_equal(values(weights.load("rope_freqs.weight")), divisors)
    assert weights.shape("rope_freqs.weight") == (8,)


def test_derived_tensors_are_passed_over(make_gguf, llama_tensors):
    llama_tensors["blk.0.attn_rot_embd.weight"] = np.ones(8, np.float32)
    assert len(GGUFWeights(make_gguf(tensors=llama_tensors)).names()) == 20


CONTRADICTIONS = {
    "shape": (
        {"output_norm.weight": np.ones(65, np.float32)},
        r"'output_norm\.weight' must be \[64\].*is \[65\]",
    ),
    "transposed": (
        {"blk.1.ffn_up.weight": np.ones((64, 96), np.float32)},
        r"'blk\.1\.ffn_up\.weight' must be \[96, 64\].*is \[64, 96\]",
    ),
    "missing": ({"blk.1.ffn_up.weight": None}, r"'blk\.1\.ffn_up\.weight' is missing"),
    "surplus": (
        {"blk.0.attn_q.scale": np.ones(1, np.float32)},
        r"'blk\.0\.attn_q\.scale' has no place",
    ),
    "factors": (
        {"rope_freqs.weight": np.ones(9, np.float32)},
        r"'rope_freqs\.weight' must be \[8\]",
    ),
    "bad factors": ({"rope_freqs.weight": np.zeros(8, np.float32)}, "factors that cannot be"),
    "no embedding": ({"token_embd.weight": None}, r"'token_embd\.weight' is missing"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tensors_that_contradict_the_metadata(make_gguf, llama_tensors, name):
    changes, message = CONTRADICTIONS[name]
    stored = {n: a for n, a in (llama_tensors | changes).items() if a is not None}
    path = make_gguf(tensors=stored)
    with pytest.raises(FormatError, match=message) as caught:
        GGUFWeights(path)
    assert str(path) in str(caught.value)


def test_vectors_must_be_plain(make_gguf, llama_tensors):
    path = make_gguf(tensors=llama_tensors, types={"blk.0.attn_norm.weight": QTYPE.Q8_0})
    with pytest.raises(FormatError, match=r"'blk\.0\.attn_norm\.weight' must not be quantized"):
        GGUFWeights(path)


def test_arrays_stay_valid_after_close(make_gguf, llama_tensors):
    weights = GGUFWeights(make_gguf())
    norm = weights.load("model.norm.weight").array
    weights.close()
    np.testing.assert_array_equal(norm, llama_tensors["output_norm.weight"])
    with pytest.raises(KeyError):
        weights.shape("no.such.tensor")
