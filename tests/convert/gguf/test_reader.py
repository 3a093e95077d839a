"""Good GGUF files: every value type, byte order and tensor type, against gguf-py and ggml."""

from __future__ import annotations

import ctypes
import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter

from rl_mlx.convert.gguf.reader import GGMLType, GGUFFile, StringArray, TensorInfo, ValueType
from rl_mlx.convert.gguf.types import RETIRED
from rl_mlx.errors import FormatError, InvalidRequest, UnsupportedModel

Write = Callable[[GGUFWriter], object]
ENDIANS = [GGUFEndian.LITTLE, GGUFEndian.BIG]
SCALARS = {
    GGUFValueType.UINT8: [0, 255],
    GGUFValueType.INT8: [-128, 127],
    GGUFValueType.UINT16: [0, 65535],
    GGUFValueType.INT16: [-32768, 32767],
    GGUFValueType.UINT32: [0, 2**32 - 1],
    GGUFValueType.INT32: [-(2**31), 2**31 - 1],
    GGUFValueType.FLOAT32: [-1.5, float("inf")],
    GGUFValueType.BOOL: [True, False],
    GGUFValueType.STRING: ["", "grüß 日本 🙂"],
    GGUFValueType.UINT64: [0, 2**64 - 1],
    GGUFValueType.INT64: [-(2**63), 2**63 - 1],
    GGUFValueType.FLOAT64: [1e-300, -math.pi],
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a file with gguf-py: ``written(fill)`` calls ``fill(writer)`` and gives the path."""

    def make(fill: Write, endian: GGUFEndian = GGUFEndian.LITTLE, **options: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = GGUFWriter(path, "llama", endianess=endian, **options)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.mark.parametrize("endian", ENDIANS)
@pytest.mark.parametrize("kind", SCALARS)
def test_scalars(written: Callable[..., Path], kind: GGUFValueType, endian: GGUFEndian) -> None:
    def fill(writer: GGUFWriter) -> None:
        for i, value in enumerate(SCALARS[kind]):
            writer.add_key_value(f"k{i}", value, kind)

    with GGUFFile.open(written(fill, endian)) as file:
        assert file.byte_order == endian.name.lower()
        assert file.version == 3
        assert file.str("general.architecture") == "llama"
        found = [file.metadata["k0"], file.metadata["k1"]]
    assert found == SCALARS[kind]
    assert [type(value) for value in found] == [type(value) for value in SCALARS[kind]]


@pytest.mark.parametrize("endian", ENDIANS)
@pytest.mark.parametrize("kind", SCALARS)
def test_arrays(written: Callable[..., Path], kind: GGUFValueType, endian: GGUFEndian) -> None:
    values = SCALARS[kind] * 3

    def fill(writer: GGUFWriter) -> None:
        writer.add_key_value("a", values, GGUFValueType.ARRAY, sub_type=kind)
        writer.add_key_value("after", 7, GGUFValueType.UINT8)

    file = GGUFFile.open(written(fill, endian))
    found = file.metadata["a"]
    assert list(found) == values  # type: ignore[arg-type]
    assert file.int("after") == 7
    if kind is GGUFValueType.STRING:
        assert isinstance(found, StringArray)
    else:
        assert isinstance(found, np.ndarray)
        assert found.dtype == GGUFReader.gguf_scalar_to_np[kind]
        assert found.dtype.isnative


def test_arrays_of_arrays(written: Callable[..., Path]) -> None:
    values = [[["a", "b"], ["c"]], [["d"]]]

    def fill(writer: GGUFWriter) -> None:
        writer.add_key_value("strings", values, GGUFValueType.ARRAY)
        writer.add_key_value("numbers", [[1, 2, 3], [4]], GGUFValueType.ARRAY)

    file = GGUFFile.open(written(fill))
    strings: Any = file.metadata["strings"]
    assert [[list(inner) for inner in outer] for outer in strings] == values
    numbers: Any = file.metadata["numbers"]
    assert isinstance(numbers, tuple)
    assert [inner.tolist() for inner in numbers] == [[1, 2, 3], [4]]


def test_empty_arrays_and_odd_truth(tmp_path: Path) -> None:
    def pair(key: bytes, kind: int, payload: bytes) -> bytes:
        return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload

    path = tmp_path / "m.gguf"
    path.write_bytes(
        b"GGUF"
        + struct.pack("<IQQ", 2, 0, 4)
        + pair(b"flag", ValueType.BOOL, b"\x02")
        + pair(b"flags", ValueType.ARRAY, struct.pack("<IQ3B", ValueType.BOOL, 3, 0, 1, 255))
        + pair(b"strings", ValueType.ARRAY, struct.pack("<IQ", ValueType.STRING, 0))
        + pair(b"numbers", ValueType.ARRAY, struct.pack("<IQ", ValueType.FLOAT32, 0))
    )
    file = GGUFFile.open(path)
    assert file.version == 2
    assert file.bool("flag") is True
    assert file.array("flags").tolist() == [False, True, True]
    assert list(file.strings("strings")) == []
    assert file.array("numbers").shape == (0,)


def test_string_array(written: Callable[..., Path]) -> None:
    words = ["a", "ä", "", "xyz" * 100, b"\xff\xfe"]
    file = GGUFFile.open(written(lambda w: w.add_array("words", words)))
    found = file.strings("words")
    assert len(found) == 5
    assert found[1] == "ä"
    assert found[-2] == "xyz" * 100
    assert found[1:3] == ["ä", ""]
    assert "xyz" * 100 in found
    assert list(found) == [*words[:4], "\udcff\udcfe"]
    assert found[4].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert repr(found) == "<StringArray of 5 strings>"
    with pytest.raises(IndexError):
        found[5]


DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64]


@pytest.mark.parametrize("endian", ENDIANS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_tensors(written: Callable[..., Path], dtype: Any, endian: GGUFEndian) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-99, 99, shape).astype(dtype) for shape in [(5,), (3, 4), (2, 3, 4, 5)]]

    def fill(writer: GGUFWriter) -> None:
        for i, array in enumerate(arrays):  # gguf-py swaps the array it was given in place
            writer.add_tensor(f"t{i}", array.copy())

    file = GGUFFile.open(written(fill, endian))
    assert list(file.tensors) == ["t0", "t1", "t2"]
    for i, array in enumerate(arrays):
        raw = file.raw(f"t{i}")
        assert file.tensors[f"t{i}"].shape == array.shape
        assert raw.shape == (*array.shape[:-1], array.shape[-1] * array.itemsize)
        assert raw.shape[-1] == file.tensors[f"t{i}"].row_bytes
        np.testing.assert_array_equal(raw.view(array.dtype.newbyteorder("<")), array)
        assert not raw.flags.writeable


def test_quantized_tensors(written: Callable[..., Path]) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5, 2 * 34), np.uint8)

    def fill(writer: GGUFWriter) -> None:
        writer.add_tensor("q", blocks.copy(), raw_dtype=GGMLQuantizationType.Q8_0)

    file = GGUFFile.open(written(fill))
    info = file.tensors["q"]
    assert (info.shape, info.type, info.nbytes) == ((3, 5, 64), GGMLType.Q8_0, blocks.nbytes)
    np.testing.assert_array_equal(file.raw("q"), blocks)

    big = GGUFFile.open(written(fill, GGUFEndian.BIG))
    with pytest.raises(UnsupportedModel, match="'q' is big-endian Q8_0; run gguf-convert-endian"):
        big.raw("q")


def test_alignment(written: Callable[..., Path]) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(4096)
        writer.add_tensor("a", np.arange(3, dtype=np.float32))
        writer.add_tensor("b", np.arange(5, dtype=np.float32))

    path = written(fill)
    with path.open("ab") as stream:
        stream.write(b"a signature, perhaps")
    file = GGUFFile.open(path)
    assert [info.offset for info in file.tensors.values()] == [4096, 8192]
    np.testing.assert_array_equal(file.raw("b").view("<f4"), np.arange(5))


def test_raw_is_a_view_that_outlives_close(written: Callable[..., Path]) -> None:
    file = GGUFFile.open(written(lambda w: w.add_tensor("t", np.arange(8, dtype=np.float32))))
    raw = file.raw("t")
    assert np.shares_memory(raw, file.raw("t"))
    file.close()
    np.testing.assert_array_equal(raw.view("<f4"), np.arange(8))
    with pytest.raises(InvalidRequest, match="closed"):
        file.raw("t")


def test_accessors(written: Callable[..., Path]) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_uint32("n", 3)
        writer.add_float32("x", 0.5)
        writer.add_bool("yes", True)
        writer.add_array("list", [1, 2])
        writer.add_array("words", ["a"])

    file = GGUFFile.open(written(fill))
    assert (file.int("n"), file.float("x"), file.float("n")) == (3, 0.5, 3.0)
    assert (file.bool("yes"), file.str("general.architecture")) == (True, "llama")
    assert file.array("list").tolist() == [1, 2]
    assert (file.get("none"), file.get("none", 4), file.get("n")) == (None, 4, 3)
    assert (file.int("none", 4), file.float("none", 1.0)) == (4, 1.0)
    assert (file.str("none", "s"), file.bool("none", False)) == ("s", False)
    wrong: list[tuple[Callable[[str], object], str, str]] = [
        (file.int, "x", "'x' must be a whole number, not float"),
        (file.int, "yes", "'yes' must be a whole number, not bool"),
        (file.float, "words", "'words' must be a number, not StringArray"),
        (file.str, "n", "'n' must be a string, not int"),
        (file.bool, "n", "'n' must be true or false, not int"),
        (file.array, "words", "'words' must be numbers, not StringArray"),
        (file.strings, "list", "'list' must be strings, not ndarray"),
        (file.int, "none", "no metadata key 'none'"),
        (file.raw, "none", "no tensor 'none'"),
    ]
    for accessor, key, message in wrong:
        with pytest.raises(FormatError, match=message):
            accessor(key)


def test_types_are_those_of_gguf_py() -> None:
    ours = {t.name: (int(t), t.block_size, t.block_bytes) for t in GGMLType}
    theirs = {t.name: (int(t), *gguf.GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType}
    theirs["Q8_1"] = (9, 32, 36)  # ggml's own size; gguf-py still has that of before 2024
    assert {name: ours.get(name) for name in theirs} == theirs
    assert {t.name: int(t) for t in ValueType} == {t.name: int(t) for t in GGUFValueType}


def test_types_are_those_of_ggml() -> None:
    package = Path(pytest.importorskip("xllamacpp").__file__).parent
    ggml = ctypes.CDLL(str(next(package.glob("xllamacpp*.so"))))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    for number in range(max(GGMLType) + 1):
        if number in RETIRED:
            assert ggml.ggml_blck_size(number) == 0
            continue
        kind = GGMLType(number)
        assert ggml.ggml_type_name(number).decode().upper() == kind.name
        assert ggml.ggml_blck_size(number) == kind.block_size
        assert ggml.ggml_type_size(number) == kind.block_bytes


def test_split(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = tuple(tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    for path in paths:
        file = GGUFFile.open(path)
        assert file.paths == paths
        assert file.str("general.architecture") == "llama"
        assert [info.part for info in file.tensors.values()] == [0, 0, 1, 1, 2]
        for i in range(5):
            assert file.raw(f"t{i}").view("<f4").tolist() == [[i] * 3] * 2


def test_a_5_gb_file_costs_its_header_only(tmp_path: Path) -> None:
    rows, width = 300_000, 4096
    path = tmp_path / "big.gguf"
    name = b"t"
    info = struct.pack("<Q1sIQQIQ", len(name), name, 2, width, rows, GGMLType.F32, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info)
    with path.open("r+b") as stream:
        stream.truncate(96 + rows * width * 4)
        stream.seek(-4, 2)
        stream.write(struct.pack("<f", 2.5))
    tracemalloc.start()
    file = GGUFFile.open(path)
    last = file.raw("t")[-1].view("<f4")[-1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last == 2.5
    assert peak < 1 << 20


@pytest.mark.shared
def test_a_vocabulary_is_walked_and_not_decoded(shared: Path) -> None:
    tracemalloc.start()
    file = GGUFFile.open(shared / "vocab" / "ggml-vocab-qwen2.gguf")
    tokens = file.strings("tokenizer.ggml.tokens")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tokens) == 151_936
    assert tokens[0] == "!"
    assert tokens[151_643] == "<|endoftext|>"
    assert peak < 8 * 303_000 * 3  # eight bytes a string, and the growing of their array


def same_as_gguf_py(path: Path) -> None:
    file, peer = GGUFFile.open(path), GGUFReader(path)
    keys = [key for key in peer.fields if not key.startswith("GGUF.")]
    assert list(file.metadata) == keys
    for key in keys:
        value: Any = file.metadata[key]
        expected = peer.fields[key].contents()
        assert (list(value) if isinstance(value, (np.ndarray, StringArray)) else value) == expected
    assert list(file.tensors) == [tensor.name for tensor in peer.tensors]
    for tensor in peer.tensors:
        info = file.tensors[tensor.name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert info == TensorInfo(
            tensor.name,
            shape,
            GGMLType[tensor.tensor_type.name],
            tensor.n_bytes,
            tensor.data_offset,
        )
        assert file.raw(tensor.name).tobytes() == tensor.data.tobytes()


@pytest.mark.shared
def test_real_files_read_as_gguf_py_reads_them(shared: Path) -> None:
    quants = sorted((shared / "quants").glob("*.gguf"))
    assert len(quants) > 8
    others = (
        "models/stories260K.gguf",
        "parity/lfm2.gguf",
        "malformed/docker_dummy.gguf",
        "vocab/ggml-vocab-llama-spm.gguf",
    )
    for path in (*quants, *(shared / other for other in others)):
        same_as_gguf_py(path)


@pytest.mark.shared
def test_a_real_split_file(shared: Path) -> None:
    path = shared / "malformed" / "split" / "dummy-00001-of-00002.gguf"
    file = GGUFFile.open(path)
    peer = GGUFReader(path.with_name("dummy-00002-of-00002.gguf"))
    assert file.int("split.tensors.count") == len(peer.tensors) == 10
    for tensor in peer.tensors:
        assert file.tensors[tensor.name].part == 1
        assert file.raw(tensor.name).tobytes() == tensor.data.tobytes()
