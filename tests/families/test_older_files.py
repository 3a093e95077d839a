"""GGUF files of earlier converters, which lay the same tensors out otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rl_mlx.convert import export
from rl_mlx.convert.gguf.weights import GGUFWeights


@pytest.fixture
def phi(make_folder: Callable[[dict[str, Any]], Path], named: Callable[[str], Any]) -> Path:
    """Phi 2 as it is exported today."""
    folder = make_folder(named("phi"))
    export(folder, folder.with_suffix(".gguf"))
    return folder.with_suffix(".gguf")


def test_phi_with_queries_keys_and_values_in_one(phi: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(phi)
    tensors = {t.name: t.data for t in reader.tensors}
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "phi2")
    for field in reader.fields.values():
        if field.name.startswith("phi2."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    old, new = GGUFWeights(tmp_path / "old.gguf"), GGUFWeights(phi)
    assert old.names() == new.names()
    for name in new.names():
        np.testing.assert_array_equal(old.load(name).array, new.load(name).array, err_msg=name)
        if len(new.shape(name)) > 1:
            np.testing.assert_array_equal(old.rows(name, 3, 9), new.rows(name, 3, 9))
