"""One door for all formats; what is no model says what it is."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.open import open_weights
from rl_mlx.errors import FormatError, ModelNotFound, RlMlxError


def test_files_and_folders(make_gguf, make_folder, hf_config, mlx_model):
    path = make_gguf()
    assert isinstance(open_weights(path), GGUFWeights)
    assert isinstance(open_weights(str(path)), GGUFWeights)
    arrays = dict(tree_flatten(mlx_model(hf_config()).parameters()))
    folder = make_folder(hf_config(), {"model.safetensors": arrays})
    assert isinstance(open_weights(folder), FolderWeights)
    with pytest.raises(FormatError, match="a part of a model; give its folder"):
        open_weights(folder / "model.safetensors")


def test_a_folder_with_one_gguf_model(make_gguf, tmp_path):
    folder = tmp_path / "lmstudio"
    folder.mkdir()
    make_gguf().rename(folder / "tiny-Q8_0.gguf")
    (folder / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF")
    assert open_weights(folder).path == folder / "tiny-Q8_0.gguf"
    make_gguf().rename(folder / "tiny-Q4_0.gguf")
    with pytest.raises(FormatError, match=r"holds 2 models; give one.*Q4_0\.gguf, tiny-Q8_0\.gguf"):
        open_weights(folder)


@pytest.mark.shared
def test_of_a_split_model_the_first_part_is_opened(shared):
    with pytest.raises(
        RlMlxError, match="00001-of-00002"
    ):  # well-formed, but of a toy architecture
        open_weights(shared / "malformed" / "split")


def test_nothing_there(tmp_path):
    with pytest.raises(ModelNotFound, match="neither a config"):
        open_weights(tmp_path)
    with pytest.raises(ModelNotFound, match="no such"):
        open_weights(tmp_path / "absent.gguf")


@pytest.mark.shared
def test_malformed_files(shared):
    paths = [p for p in sorted((shared / "malformed").rglob("*")) if p.is_file()]
    assert paths
    for path in paths:
        with pytest.raises(RlMlxError) as caught:
            open_weights(path)
        assert "\n" not in str(caught.value)


def test_nothing_is_evaluated_on_the_way(make_gguf):
    before = mx.get_active_memory()
    open_weights(make_gguf())
    assert mx.get_active_memory() == before
