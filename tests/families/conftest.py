"""Tiny models of every family: the registry of their configs, and two hands that fill them.

``registry/NAME.json`` is one family. ``config`` has what its transformers config takes beside
``COMMON``. ``transformers: false`` marks one that transformers has no class of, ``gguf`` says why
there is no way to GGUF, and ``llama.cpp`` in what it differs from the model: ``bound`` is the
relative error that follows, ``same`` the share of best tokens that stay, ``why`` the reason.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rl_mlx.convert.hfconfig import bilingual
from rl_mlx.convert.layout import layout

Entry = dict[str, Any]
REGISTRY = Path(__file__).parent / "registry"
COMMON: Entry = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 272,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def entry(name: str) -> Entry:
    """One family of the registry, its config whole."""
    found: Entry = json.loads((REGISTRY / f"{name}.json").read_text("utf-8"))
    found["config"] = {"model_type": name, **COMMON, **found["config"]}
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for a ``family`` runs for all of them."""
    if "family" in metafunc.fixturenames:
        names = sorted(path.stem for path in REGISTRY.glob("*.json"))
        metafunc.parametrize("family", [entry(name) for name in names], ids=names)


@pytest.fixture
def named() -> Callable[[str], Entry]:
    """One family of the registry by its name."""
    return entry


@pytest.fixture
def add_tokenizer() -> Callable[[Path], None]:
    """Write a tokenizer into a folder."""
    return _tokenizer


@pytest.fixture
def ids() -> list[int]:
    """A text longer than any window of the registry."""
    return np.random.default_rng(7).integers(3, 256, 40).tolist()


def _tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: a token a byte, two special ones and some never used."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *letters, *(f"<{i}>" for i in range(13))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def _filled(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor whose every part matters: norms away from 1, biases from 0."""
    values = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 0.2 * values + (1 if "norm" in name and name.endswith("weight") else 0)
    return values * np.float32(shape[-1] ** -0.5)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[Entry], Path]:
    """The folder of a family as the layout says it must be, filled without torch."""

    def make(family: Entry) -> Path:
        config = bilingual(family["config"])
        rng = np.random.default_rng(3)
        shapes = layout(config, 10_000)
        arrays = {name: mx.array(_filled(rng, name, shape)) for name, shape in shapes.items()}
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        _tokenizer(folder)
        return folder

    return make


@pytest.fixture
def transformers_folder(
    tmp_path: Path, ids: list[int]
) -> Callable[[Entry], tuple[Path, np.ndarray]]:
    """A folder that transformers saved, and the float32 logits ``[len(ids), vocab]`` it gives."""

    def make(family: Entry) -> tuple[Path, np.ndarray]:
        if family.get("transformers") is False:
            pytest.skip("transformers has no class of this family")
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs torch: pip install -e '.[parity]'")
        return _saved_by_transformers(family["config"], tmp_path / "transformers", ids)

    return make


def _saved_by_transformers(config: Entry, folder: Path, ids: list[int]) -> tuple[Path, np.ndarray]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    torch.set_num_threads(1)
    given = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(given, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder, logits.float().numpy()
