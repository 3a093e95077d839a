"""mlx-lm's AWQ, GPTQ and DWQ: called with our text, and folders that load come out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rl_mlx import LLM
from rl_mlx.convert import convert, inspect
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.quantize import dequantize
from rl_mlx.demo import demo_path
from rl_mlx.errors import DestinationExists, InvalidRequest, UnsupportedModel
from rl_mlx.lab import calibrate, demo_text, divergence

# mlx-lm compiles on the way, which needs a compiler where there is no GPU.
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of the demo model as a folder of floats."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    convert(demo_path(), folder)
    weights = open_weights(folder)
    kept = [n for n in weights.names() if ".layers." not in n or ".layers.0." in n]
    arrays = {name: np.array(dequantize(weights.load(name))) for name in kept}
    weights.close()
    config = json.loads((folder / "config.json").read_text())
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for path in (*folder.glob("model*.safetensors*"), folder / "rl_mlx.json"):
        path.unlink()
    save_file(arrays, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_folders_come_out_that_run(source: Path, tmp_path: Path, method: str):
    calibrate(source, tmp_path / "made", method, demo_text(), length=32, samples=3)
    assert 4 < inspect(tmp_path / "made").bits_per_weight < 7
    with (
        LLM(str(source), backend="mlx") as base,
        LLM(str(tmp_path / "made"), backend="mlx") as made,
    ):
        found = divergence(made, base, demo_text(seed=3), window=32, stride=32, tokens=64)
    assert 0 < found.mean < 0.5
    with pytest.raises(DestinationExists):
        calibrate(source, tmp_path / "made", method, demo_text())


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path):
    with pytest.raises(InvalidRequest, match="no method 'magic'"):
        calibrate(source, tmp_path / "made", "magic")
    with pytest.raises(InvalidRequest, match="no folder of plain floats"):
        calibrate(tmp_path, tmp_path / "made", "awq")
    with pytest.raises(InvalidRequest, match="fewer than two pieces of 9000"):
        calibrate(source, tmp_path / "made", "gptq", demo_text(), length=9000)
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_awq_does_not_know(source: Path, tmp_path: Path, monkeypatch):
    from mlx_lm.quant import awq

    monkeypatch.delitem(awq.AWQ_MODEL_CONFIGS, "llama")
    with pytest.raises(UnsupportedModel, match="AWQ does not know 'llama'; it knows"):
        calibrate(source, tmp_path / "made", "awq", demo_text(), length=32, samples=2)
    assert not (tmp_path / "made").exists()
