"""A home of its own, and the layouts of other programs' stores made in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.store.fakehub import FakeHub, serve

VARIABLES = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS",
    "LLAMA_CACHE", "HF_ENDPOINT", "HF_TOKEN",
)  # fmt: skip
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, with no variable that leads out of it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def hub_repo(home: Path) -> Callable[..., Path]:
    """Puts a repository into the Hugging Face cache as its client does; gives the snapshot."""

    def make(
        repo: str, files: Mapping[str, bytes], commit: str = "a" * 40, ref: str = "main"
    ) -> Path:
        folder = home / ".cache/huggingface/hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        for name, content in files.items():
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return snapshot

    return make


@pytest.fixture
def safetensors_files() -> dict[str, bytes]:
    """What a small model's repository holds."""
    return {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": b"w" * 40}


@pytest.fixture
def ollama_model(home: Path) -> Callable[..., Path]:
    """Puts a model into Ollama's store; gives the manifest."""

    def make(
        name: str = "registry.ollama.ai/library/llama3.1/8b", content: bytes = b"GGUF"
    ) -> Path:
        digest = hashlib.sha256(content).hexdigest()
        root = home / ".ollama/models"
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "blobs" / f"sha256-{digest}").write_bytes(content)
        manifest = root / "manifests" / name
        manifest.parent.mkdir(parents=True, exist_ok=True)
        kind = "application/vnd.ollama.image."
        layers = [
            {"mediaType": f"{kind}template", "digest": "sha256:" + "0" * 64, "size": 1},
            {"mediaType": f"{kind}model", "digest": f"sha256:{digest}", "size": len(content)},
        ]
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
        return manifest

    return make


@pytest.fixture
def fake_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
