"""Importance matrices, in both of their forms."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from rl_mlx.convert.gguf.imatrix import read_imatrix
from rl_mlx.errors import FormatError, ModelNotFound

NAME = "blk.0.ffn_up_exps.weight"


def write_gguf(path, sums, counts, kind="imatrix", name=NAME):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_tensor(f"{name}.in_sum2", sums)
    if counts is not None:
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    sums = np.array([[2, 4, 6], [9, 9, 9], [5, 10, 0]], np.float32)
    write_gguf(tmp_path / "i.gguf", sums, np.array([[2], [0], [5]], np.float32))
    found = read_imatrix(tmp_path / "i.gguf")
    assert list(found) == [NAME]
    # The expert in the middle was never chosen.
    np.testing.assert_array_equal(found[NAME], [[1, 2, 3], [1, 1, 1], [1, 2, 0]])


def test_dat(tmp_path, write_dat):
    values = {"a.weight": np.arange(6, dtype=np.float32), "b.weight": np.ones(2, np.float32)}
    write_dat(tmp_path / "i.dat", values, calls=2)
    found = read_imatrix(tmp_path / "i.dat")
    np.testing.assert_array_equal(found["a.weight"], [np.arange(6) / 2])
    np.testing.assert_array_equal(found["b.weight"], [[0.5, 0.5]])


def test_what_is_none(tmp_path, write_dat):
    path = tmp_path / "x"
    with pytest.raises(ModelNotFound):
        read_imatrix(path)
    for data in (b"", b"\x01", b"\xff\xff\xff\x7f" * 3, b"\x01\0\0\0\xff\xff\0\0"):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            read_imatrix(path)
    write_dat(path, {"a": np.ones(8, np.float32)})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FormatError, match="ends within 'a'"):
        read_imatrix(path)
    for bad in (np.nan, np.inf, -1):
        write_dat(path, {"a": np.array([1, bad], np.float32)})
        with pytest.raises(FormatError, match="'a' has values that cannot be"):
            read_imatrix(path)
    ones = np.ones((1, 4), np.float32)
    write_gguf(path, ones, np.ones((1, 1), np.float32), kind="model")
    with pytest.raises(FormatError, match="no importance matrix"):
        read_imatrix(path)
    write_gguf(path, ones, None)
    with pytest.raises(FormatError, match="counts"):
        read_imatrix(path)
