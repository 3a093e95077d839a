"""InternLM 2 is read as Llama: against mlx-lm's own module, and llama.cpp's architecture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rl_mlx import LLM
from rl_mlx.convert import export

CONFIG: dict[str, Any] = {
    "model_type": "internlm2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 272,
    "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def saved(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    add_tokenizer: Callable[[Path], None],
    ids: list[int],
) -> tuple[Path, np.ndarray]:
    """A folder of mlx-lm's InternLM 2, and the logits it gives."""
    module = pytest.importorskip("mlx_lm.models.internlm2")
    mx.random.seed(3)
    config = {**CONFIG, "bias": request.param}
    model = module.Model(module.ModelArgs.from_dict(config))
    arrays = {
        name: array + 0.2 * mx.random.normal(array.shape)
        for name, array in tree_flatten(model.parameters())
    }
    model.load_weights(list(arrays.items()))
    mx.disable_compile()  # it runs a C++ compiler, which need not be there
    want = np.array(model(mx.array([ids]))[0])
    mx.enable_compile()
    folder = tmp_path / "folder"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config))
    add_tokenizer(folder)
    return folder, want


def logits(model: Path, ids: list[int], backend: str = "mlx") -> np.ndarray:
    with LLM(str(model), backend=backend, dtype="float32") as llm:
        return llm.logits(ids)


def test_a_folder_has_the_logits_of_mlx_lm(saved: tuple[Path, np.ndarray], ids: list[int]) -> None:
    folder, want = saved
    assert np.linalg.norm(logits(folder, ids) - want) < 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("saved", [False], indirect=True, ids=["plain"])
@pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp's C API is hidden on Windows")
def test_a_file_of_its_architecture_has_the_logits_of_llamacpp(
    saved: tuple[Path, np.ndarray], tmp_path: Path, ids: list[int]
) -> None:
    pytest.importorskip("xllamacpp")
    folder, want = saved
    export(folder, tmp_path / "llama.gguf")
    reader = gguf.GGUFReader(tmp_path / "llama.gguf")
    writer = gguf.GGUFWriter(tmp_path / "internlm2.gguf", "internlm2")
    for field in reader.fields.values():
        name = field.name.replace("llama.", "internlm2.", 1)
        if name.startswith(("internlm2.", "tokenizer.")):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            value = field.contents()
            if value == []:  # which gguf-py does not write
                value = ["a b"]
            writer.add_key_value(name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for backend in ("mlx", "llama.cpp"):
        found = logits(tmp_path / "internlm2.gguf", ids, backend)
        assert np.linalg.norm(found - want) < 1e-5 * np.linalg.norm(want), backend
