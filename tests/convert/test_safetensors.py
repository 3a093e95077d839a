"""Safetensors: what others wrote is read, what lies is refused."""

from __future__ import annotations

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rl_mlx.convert import safetensors
from rl_mlx.convert.safetensors import SafetensorsFile
from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel


def write(path, header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_safetensors_package_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.integers(0, 255, (2, 3, 4), np.uint8),
        "d": rng.integers(-9, 9, (), np.int64),
        "e": np.array([True, False]),
        "f": np.empty((0, 4), np.float32),
        "g": rng.integers(0, 1 << 32, 5, np.uint32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        found = file.array(name)
        assert file.tensors[name].shape == array.shape
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_bfloat16_comes_as_its_bits(tmp_path):
    values = mx.array([1.0, -2.5, 3e38], mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": values})
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert file.tensors["a"].dtype == "BF16"
    np.testing.assert_array_equal(file.array("a"), np.array(values.view(mx.uint16)))


def test_views_outlive_the_file_and_cannot_be_written(tmp_path):
    save_file({"a": np.arange(6, dtype=np.float32)}, tmp_path / "x.safetensors")
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    view = file.array("a")
    file.close()
    assert view.tolist() == [0, 1, 2, 3, 4, 5]
    assert not view.flags.writeable
    with pytest.raises(InvalidRequest, match="closed"):
        file.array("a")


def test_types_without_numpy_are_listed_but_not_read(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry("F8_E5M2", (8,))}, bytes(8))
    file = SafetensorsFile.open(path)
    assert file.tensors["a"].shape == (8,)
    with pytest.raises(UnsupportedModel, match=r"'a' is of type F8_E5M2.*use a"):
        file.array("a")


LIES = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'b' overlaps"),
    "same place": ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "'b' follows a gap"),
    "out of file": ({"a": entry(shape=(4,), offsets=(0, 16))}, bytes(8), "download it again"),
    "too much data": ({"a": entry()}, bytes(9), "end at byte"),
    "starts late": ({"a": entry(offsets=(4, 12))}, bytes(12), "follows a gap"),
    "wrong length": ({"a": entry(offsets=(0, 4))}, bytes(4), r"takes 8 bytes.*say 4"),
    "backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), "takes 8 bytes"),
    "unknown type": ({"a": entry("F32x")}, bytes(8), "unknown type 'F32x'"),
    "type is a list": ({"a": entry(["F32"])}, bytes(8), "unknown type"),
    "negative shape": ({"a": entry(shape=(-2,))}, bytes(8), "has the shape"),
    "huge shape": ({"a": entry(shape=(1 << 40, 1 << 40))}, bytes(8), "takes"),
    "many axes": ({"a": entry(shape=[1] * 33, offsets=(0, 4))}, bytes(4), "has the shape"),
    "shape of floats": ({"a": entry(shape=(2.0,))}, bytes(8), "has the shape"),
    "shape of bools": ({"a": entry(shape=(True, 2))}, bytes(8), "has the shape"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), "has the offsets"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, bytes(8), "has the offsets"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "has the shape"),
    "no object": ({"a": 3}, bytes(8), "described by int"),
    "no JSON": (b"{nope", b"", "broken"),
    "no UTF-8": (b'{"\xff": 1}', b"", "broken"),
    "twins": (b'{"a": 1, "a": 2}', b"", "'a' is there twice"),
    "a list": (b"[]", b"", "no JSON object"),
    "deep": (b"[" * 100_000, b"", "broken"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(tmp_path, lie):
    header, data, message = LIES[lie]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1000, safetensors.MAX_HEADER + 1, (1 << 64) - 1])
def test_header_lengths_are_not_believed(tmp_path, size):
    path = write(tmp_path / "x.safetensors", {}, size=size)
    with pytest.raises(FormatError, match="header cannot be"):
        SafetensorsFile.open(path)


def test_headers_beyond_the_limit_are_not_parsed(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", safetensors.MAX_HEADER + 1))
        file.truncate(safetensors.MAX_HEADER + 100)  # sparse
    with pytest.raises(FormatError, match="header cannot be"):
        SafetensorsFile.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"abc", "header cannot be"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"GGUF" + bytes(100), "header cannot be"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        SafetensorsFile.open(path)


def test_missing_file(tmp_path):
    with pytest.raises(ModelNotFound, match="no such file"):
        SafetensorsFile.open(tmp_path / "x.safetensors")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    octets = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(octets[: data.draw(st.integers(0, len(octets)))])
    try:
        file = SafetensorsFile.open(path)
        for name in file.tensors:
            file.array(name)
    except (FormatError, UnsupportedModel):
        pass
