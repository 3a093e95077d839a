"""Which files of a folder make one model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.errors import ModelNotFound
from rl_mlx.store.models import first_part, generates, models_in, pick, variants


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("model-q8_0.gguf", "Q8_0"),
        ("gemma-3-4b-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("qwen2.5-7b.IQ2_XXS.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("BF16/Model-BF16-00001-of-00001.gguf", "BF16"),
        ("tiny-fp16.gguf", "FP16"),
        ("Q6_K/model.gguf", "Q6_K"),
        ("stories260K.gguf", "stories260K"),
    ],
)
def test_the_name_tells_the_quantization(name: str, tag: str) -> None:
    assert [v.tag for v in variants([name])] == [tag]


def test_parts_are_put_together_in_order() -> None:
    names = [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (3, 1, 2)]
    (whole,) = variants(names)
    assert whole.files == tuple(sorted(names))
    assert whole.complete
    (broken,) = variants(names[:2])
    assert not broken.complete


def test_projectors_matrices_and_hostile_names_are_no_models() -> None:
    names = ["mmproj-F16.gguf", "imatrix.gguf", "../up-Q4_0.gguf", "/abs-Q4_0.gguf", "a.txt"]
    assert variants(names) == []


def test_two_models_of_one_quantization_are_told_apart_by_name() -> None:
    found = variants(["a-Q4_0.gguf", "b-Q4_0.gguf"])
    assert [v.tag for v in found] == ["a-Q4_0", "b-Q4_0"]
    assert pick(found, "a-q4_0", "here").stem == "a-Q4_0"
    with pytest.raises(ModelNotFound, match=r"more than one model in here.*a-Q4_0, b-Q4_0"):
        pick(found, "Q4_0", "here")


def test_pick() -> None:
    found = variants(["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q8_0.gguf"])
    assert pick(found, None, "o/r").tag == "Q4_K_M"
    assert pick(found, "ud-q4_k_m", "o/r").tag == "UD-Q4_K_M"
    assert pick(found, "m-Q8_0.gguf", "o/r").tag == "Q8_0"
    with pytest.raises(ModelNotFound, match=r"no 'Q2_K' in o/r.*Q4_K_M, UD-Q4_K_M, Q8_0|Q8_0"):
        pick(found, "Q2_K", "o/r")
    with pytest.raises(ModelNotFound, match=r"more than one model in o/r.*Q5_0, Q8_0"):
        pick(variants(["m-Q5_0.gguf", "m-Q8_0.gguf"]), None, "o/r")
    assert pick(variants(["only.gguf"]), None, "o/r").tag == "only"


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30)))
def test_any_file_names_are_survived(names: list[str]) -> None:
    for variant in variants([*names, *(f"{name}.gguf" for name in names)]):
        assert variant.files
        assert all(".." not in Path(file).parts for file in variant.files)


def test_first_part() -> None:
    assert first_part(Path("x/m-00002-of-00003.gguf")) == Path("x/m-00001-of-00003.gguf")
    assert first_part(Path("x/m.gguf")) == Path("x/m.gguf")


def _folder(path: Path, **files: str) -> set[str]:
    names = {name.replace("__", "."): text for name, text in files.items()}
    for name, text in names.items():
        (path / name).write_text(text)
    return set(names)


def test_only_whole_language_models_count(tmp_path: Path) -> None:
    names = _folder(tmp_path, config__json="{}", tokenizer__json="{}", model__safetensors="w")
    assert generates(tmp_path, names)
    assert not generates(tmp_path, names - {"tokenizer.json"})
    assert not generates(tmp_path, names - {"model.safetensors"})
    _folder(tmp_path, config__json='{"architectures": ["BertModel"]}')
    assert not generates(tmp_path, names)


def test_a_missing_shard_makes_it_incomplete(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}'
    names = _folder(tmp_path, config__json="{}", tokenizer__json="{}")
    names |= {"model-00001-of-00002.safetensors"}
    assert not generates(tmp_path, names)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert not generates(tmp_path, names)
    assert generates(tmp_path, names | {"gone.safetensors"})


def test_damaged_json_is_survived(tmp_path: Path) -> None:
    names = _folder(tmp_path, config__json="[" * 100_000, tokenizer__json="", model__safetensors="")
    assert generates(tmp_path, names)
    assert [m.bytes for m in models_in(tmp_path, "x", "y")] == [0]
