"""Folders that others quantized, against a decoding written from each format's definition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from rl_mlx.convert import convert, export
from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.quantize import dequantize
from rl_mlx.convert.weights import Dense, Packed
from rl_mlx.errors import FormatError, UnsupportedModel

HIDDEN, INNER, LAYERS = 128, 256, 1
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": 40,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(code: int) -> float:
    """One float8 by the definition: bias 7, three bits of mantissa, no infinity."""
    sign, exponent, mantissa = -1 if code & 128 else 1, (code >> 3) & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return sign * value


E4M3 = np.array([e4m3(code) for code in range(256)])
BYTES = np.array([b for b in range(256) if b & 127 < 127], np.uint8)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n] as words, one after the other from the lowest bit on: by Python's integers."""
    whole = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return np.frombuffer(whole.to_bytes(4 * count, "little"), np.int32)


@pytest.fixture
def folder(tmp_path):
    """Write a folder: ``make(settings, form)``, where ``form(rng, out, in)`` gives the arrays and
    the values of a module. Returns its path, and the values by canonical name."""

    def make(settings, form, **config):
        rng = np.random.default_rng(7)
        path = tmp_path / "model"
        path.mkdir()
        norm = np.ones(HIDDEN, np.float32)
        embedding = rng.normal(size=(40, HIDDEN)).astype(np.float32)
        arrays = {"model.norm.weight": norm, "model.embed_tokens.weight": embedding}
        values = {}
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.0.{name}.weight"] = norm
        for name, (out, columns) in SHAPES.items():
            parts, found = form(rng, out, columns)
            module = f"model.layers.0.{name}"
            arrays |= {f"{module}.{part}": array for part, array in parts.items()}
            values[f"{module}.weight"] = found
        told = CONFIG | config | {"quantization_config": settings}
        (path / "config.json").write_text(json.dumps(told))
        write(path / "model.safetensors", arrays)
        return path, values

    return make


def write(path, arrays):
    """safetensors.numpy has no float8: such arrays come as (uint8, name)."""
    arrays = {name: a if isinstance(a, tuple) else (a, None) for name, a in arrays.items()}
    data = safetensors.numpy.save(
        {n: np.ascontiguousarray(a).reshape(a.shape) for n, (a, _) in arrays.items()}
    )
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, (_, kind) in arrays.items():
        header[name]["dtype"] = kind or header[name]["dtype"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def as_f8(array):
    return np.asarray(array, np.uint8), "F8_E4M3"


def scales_and_zeros(rng, groups, out, bits):
    scale = rng.uniform(0.001, 0.02, (groups, out)).astype(np.float16)
    return scale, rng.integers(0, 1 << bits, (groups, out))


def gptq(bits, group, *, version=1, act_order=False, symmetric=False):
    def form(rng, out, columns):
        size = columns if group < 0 else group
        groups = columns // size
        codes = rng.integers(0, 1 << bits, (columns, out))
        scale, zero = scales_and_zeros(rng, groups, out, bits)
        if symmetric:
            zero[:] = 1 << (bits - 1)
        place = np.arange(columns) // size
        if act_order:
            place = rng.permutation(place)
        stored = (zero - 1) % (1 << bits) if version == 1 else zero
        parts = {
            "qweight": np.stack([bit_stream(c, bits) for c in codes.T], axis=1),
            "qzeros": np.stack([bit_stream(z, bits) for z in stored]),
            "scales": scale,
            "g_idx": place.astype(np.int32),
        }
        values = (codes - zero[place]) * scale[place].astype(np.float64)
        return parts, values.T

    return form


def check(path, values, *, exact=True, dtype="float32", kind=Packed):
    weights = FolderWeights(path)
    for name, expected in values.items():
        tensor = weights.load(name)
        assert isinstance(tensor, kind), name
        assert tensor.dtype == dtype
        found = dequantize(tensor)
        if exact:
            np.testing.assert_array_equal(found, expected.astype(np.float32), name)
        else:
            step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
            np.testing.assert_allclose(found, expected, rtol=step, atol=1e-7, err_msg=name)
        by_rows = dequantize(weights.rows(name, 5, 33))
        np.testing.assert_array_equal(by_rows, found[5:33])
    return weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "version"), [(64, 1), (128, 2), (-1, 1)])
def test_gptq(bits, group, version, folder):
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    path, values = folder(settings, gptq(bits, group, version=version))
    weights = check(path, values)
    packing = weights.packing("model.layers.0.mlp.down_proj.weight")
    assert packing == (bits, 64 if group == 64 else 128, "affine")


def test_gptq_with_act_order_comes_as_the_floats_of_its_scales(folder):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    path, values = folder(settings, gptq(4, 32, act_order=True))
    check(path, values, exact=False, dtype="float16", kind=Dense)


def test_gptq_of_symmetric_codes_is_q4_0(folder, tmp_path):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    path, _ = folder(settings, gptq(4, 64, symmetric=True))
    report = export(path, tmp_path / "out.gguf")
    kinds = {t.name: t.container for t in report.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert report.is_exact
    converted = convert(path, tmp_path / "mlx")
    assert converted.max_error == 0


def test_settings_in_a_file_of_their_own(folder):
    path, values = folder(None, gptq(4, 64))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64}))
    check(path, values)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group, folder):
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is column order[i] of its eight

    def words(codes):
        columns = codes.reshape(len(codes), -1, 8)[..., order].astype(np.uint32)
        return (
            (columns << (4 * np.arange(8, dtype=np.uint32)))
            .sum(-1)
            .astype(np.uint32)
            .view(np.int32)
        )

    def form(rng, out, columns):
        codes = rng.integers(0, 16, (columns, out))
        scale, zero = scales_and_zeros(rng, columns // group, out, 4)
        parts = {"qweight": words(codes), "qzeros": words(zero), "scales": scale}
        place = np.arange(columns) // group
        return parts, ((codes - zero[place]) * scale[place].astype(np.float64)).T

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    path, values = folder(settings, form)
    check(path, values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [128, -1])
def test_packed_integers_of_compressed_tensors(bits, symmetric, group, folder):
    def form(rng, out, columns):
        size = columns if group < 0 else group
        half = 1 << (bits - 1)
        codes = rng.integers(-half, half, (out, columns))
        scale = rng.uniform(0.001, 0.02, (out, columns // size)).astype(np.float16)
        zero = np.zeros_like(scale, int)
        parts = {
            "weight_packed": np.stack([bit_stream(c, bits) for c in codes + half]),
            "weight_scale": scale,
            "weight_shape": np.array([out, columns]),
        }
        if not symmetric:
            zero = rng.integers(-half, half, scale.shape)
            columns_of = [bit_stream(z, bits) for z in (zero + half).T]
            parts["weight_zero_point"] = np.stack(columns_of, axis=1)
        values = (codes - np.repeat(zero, size, 1)) * np.repeat(scale.astype(np.float64), size, 1)
        return parts, values

    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    path, values = folder(settings, form)
    check(path, values)


@pytest.mark.parametrize("scaled_by", ["row", "tensor", "group"])
def test_whole_integers_of_compressed_tensors(scaled_by, folder):
    def form(rng, out, columns):
        codes = rng.integers(-128, 128, (out, columns)).astype(np.int8)
        shape = {"row": (out, 1), "tensor": (1,), "group": (out, columns // 64)}[scaled_by]
        scale = rng.uniform(0.001, 0.02, shape).astype(np.float16)
        wide = np.repeat(scale.reshape(-1, shape[-1]), columns // shape[-1], 1)
        values = codes * wide.astype(np.float64)
        return {"weight": codes, "weight_scale": scale}, values

    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    path, values = folder(settings, form)
    check(path, values)


@pytest.mark.parametrize("form", ["tensor", "row", "block"])
def test_fp8(form, folder):
    def make(rng, out, columns):
        codes = rng.choice(BYTES, (out, columns))
        shape = {"tensor": (), "row": (out, 1), "block": (-(-out // 48), -(-columns // 64))}[form]
        scale = rng.uniform(0.001, 0.02, shape).astype(np.float32)
        wide = scale
        if form == "block":
            wide = np.repeat(np.repeat(scale, 48, 0), 64, 1)[:out, :columns]
        part = "weight_scale_inv" if form == "block" else "weight_scale"
        parts = {"weight": as_f8(codes), part: scale, "input_scale": np.float32([1])}
        return parts, E4M3[codes] * wide

    settings = {"quant_method": "fp8", "weight_block_size": [48, 64]}
    path, values = folder(settings, make)
    check(path, values, exact=False, dtype="bfloat16", kind=Dense)


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("second", [None, 0.0371])
def test_nvfp4(method, second, folder):
    part = "weight" if method == "modelopt" else "weight_packed"

    def form(rng, out, columns):
        codes = rng.integers(0, 16, (out, columns))
        scale = rng.integers(8, 0x7E, (out, columns // 16)).astype(np.uint8)
        parts = {
            part: (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8),
            "weight_scale": as_f8(scale),
        }
        factor = 1.0
        if second is not None and method == "modelopt":
            parts["weight_scale_2"] = np.array(second, np.float32)
            factor = float(np.float32(second))
        elif second is not None:
            parts["weight_global_scale"] = np.array([1 / second], np.float32)
            factor = 1 / float(np.float32(1 / second))
        return parts, E2M1[codes] * np.repeat(E4M3[scale], 16, 1) * factor

    path, values = folder({"quant_method": method, "quant_algo": "NVFP4"}, form)
    if second is None:
        check(path, values)
    else:
        check(path, values, exact=False, dtype="bfloat16", kind=Dense)


def test_mxfp4_of_compressed_tensors(folder):
    def form(rng, out, columns):
        codes = rng.integers(0, 16, (out, columns))
        scale = rng.integers(110, 130, (out, columns // 32)).astype(np.uint8)
        octets = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
        values = E2M1[codes] * np.repeat(2.0 ** (scale.astype(int) - 127), 32, 1)
        return {"weight_packed": octets, "weight_scale": scale}, values

    path, values = folder({"quant_method": "compressed-tensors"}, form)
    check(path, values)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
    ],
)
def test_forms_that_nobody_reads_are_refused(settings, reason, folder):
    path, _ = folder(settings, gptq(4, 64))
    with pytest.raises(UnsupportedModel, match=reason):
        FolderWeights(path)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_arrays_that_contradict_each_other_are_refused(part, folder):
    def form(rng, out, columns):
        parts, values = gptq(4, 64)(rng, out, columns)
        parts[part] = parts[part][:-1]
        return parts, values

    path, _ = folder({"quant_method": "gptq", "bits": 4}, form)
    with pytest.raises(FormatError):
        FolderWeights(path)


def test_a_missing_part_is_named(folder):
    def form(rng, out, columns):
        parts, values = gptq(4, 64)(rng, out, columns)
        del parts["qzeros"]
        return parts, values

    path, _ = folder({"quant_method": "gptq", "bits": 4}, form)
    with pytest.raises(FormatError, match=r"_proj\.qzeros"):
        FolderWeights(path)
