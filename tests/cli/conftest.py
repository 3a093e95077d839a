"""A model for the commands: the fake backend behind a real tokenizer of bytes, made here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from rl_mlx.backends.base import Backend
from rl_mlx.backends.fake import INFO, FakeBackend
from rl_mlx.llm import LLM
from rl_mlx.settings import ModelSettings
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Request

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>")
CONTEXT = 400
Reply = Callable[[str], str]


def write_model(path: Path, template: str | None = TEMPLATE) -> None:
    """A GGUF file of one tensor and a vocabulary of all bytes: byte b has id b + 3."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "\u2581"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "bytes-F16.gguf"
    write_model(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_file: Path) -> Tokenizer:
    return Tokenizer.open(model_file)


@pytest.fixture
def make_llm(tokenizer: Tokenizer) -> Iterator[Callable[[Reply], LLM]]:
    """An LLM whose answer is a function of the prompt's text."""
    made: list[LLM] = []

    def make(answer: Reply) -> LLM:
        def reply(request: Request) -> Iterable[int]:
            prompt = tokenizer.decode(request.prompt)
            return [b + len(SPECIAL) for b in answer(prompt).encode()]

        info = replace(INFO, vocab=tokenizer.vocab_size, context=CONTEXT, name="bytes")
        made.append(LLM.of(FakeBackend(reply, info), tokenizer))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def loaded(
    home: Path, make_llm: Callable[[Reply], LLM], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Reply], list[tuple[str, ModelSettings]]]:
    """Makes every ``LLM(...)`` the fake one; gives the list of what was asked to be loaded."""

    def load(answer: Reply) -> list[tuple[str, ModelSettings]]:
        asked: list[tuple[str, ModelSettings]] = []

        def fake_load(model: str, settings: ModelSettings) -> tuple[Backend, Tokenizer]:
            asked.append((model, settings))
            llm = make_llm(answer)
            return llm._llm._backend, llm.tokenizer

        monkeypatch.setattr("rl_mlx.llm._load", fake_load)
        return asked

    return load


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder with no settings, and no variable that leads out of it."""
    home = tmp_path / "home"
    home.mkdir()
    prefixes = ("HF_", "XDG_", "RL_MLX_", "OLLAMA_", "LLAMA_")
    for name in [n for n in os.environ if n.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return home
