"""From what a user types to files: paths, and the stores of other programs, used in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel
from rl_mlx.store import InstalledModel, find, installed, remove, resolve
from rl_mlx.store.hub import HubRef

Make = Callable[..., Path]


def names(source: str) -> list[str]:
    return [m.name for m in installed() if m.source == source]


# --- paths


def test_a_file_a_folder_and_a_part(home: Path, tmp_path: Path) -> None:
    for name in ("m.gguf", "s-00001-of-00002.gguf", "s-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve("m.gguf").name == "m"
    assert resolve("s-00002-of-00002.gguf").path == Path("s-00001-of-00002.gguf")
    assert resolve("s-00002-of-00002.gguf").name == "s"
    assert resolve("org/model").path == Path("org/model")  # before the hub's org/model
    (folder / "model.safetensors").touch()
    assert resolve(str(folder / "model.safetensors")).path == folder


def test_a_folder_of_gguf_files(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    with pytest.raises(ModelNotFound, match=r"neither a config.json nor GGUF"):
        resolve("./many")
    (folder / "a-Q4_0.gguf").touch()
    (folder / "mmproj-a.gguf").touch()
    assert resolve("./many").path == Path("many/a-Q4_0.gguf")
    (folder / "b-Q4_0.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"more than one model; name a file: a-Q4_0.gguf, b-"):
        resolve("./many")


@pytest.mark.parametrize(
    "reference",
    ["gone.gguf", "models/gone.gguf", "./gone", "/gone", "~/gone", "~nobody-here/x", "../..gone",
     "a\0b", "x" * 5000, "gone/", "..\\..\\x"],
)  # fmt: skip
def test_what_is_not_there(home: Path, reference: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(reference)
    assert "\n" not in str(caught.value)


def test_a_broken_link_and_a_lone_part(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to("nowhere.gguf")
    with pytest.raises(ModelNotFound, match=r"link to a file that is gone: nowhere.gguf"):
        resolve("link.gguf")
    (tmp_path / "s-00002-of-00002.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"first, s-00001-of-00002.gguf, is missing"):
        resolve("s-00002-of-00002.gguf")


@pytest.mark.parametrize("reference", [
    "", "  ", "https://example.com/a/b", "o/r:../../etc", "o/r:", "o/r@..", "hf.co/datasets/x",
    "hf.co/o/r/raw/main/x",
])  # fmt: skip
def test_malformed(home: Path, reference: str) -> None:
    with pytest.raises(InvalidRequest):
        resolve(reference)


# --- Hugging Face's cache


def test_what_is_in_the_cache_needs_no_network(
    hub_repo: Make, safetensors_files: dict[str, bytes]
) -> None:
    folder = hub_repo("org/Model", safetensors_files)
    gguf = hub_repo(
        "org/m-GGUF", {"m-Q4_K_M.gguf": b"4", "m-Q8_0.gguf": b"88", "mmproj.gguf": b"p"}
    )
    assert resolve("org/Model").path == folder
    assert resolve("ORG/model").path == folder
    assert resolve("org/m-GGUF").path == gguf / "m-Q4_K_M.gguf"
    assert (
        resolve("https://huggingface.co/org/m-GGUF/blob/main/m-Q8_0.gguf").path.name
        == "m-Q8_0.gguf"
    )
    assert names("huggingface") == ["org/Model", "org/m-GGUF:Q4_K_M", "org/m-GGUF:Q8_0"]
    assert find("org/m-GGUF:Q2_K") == HubRef("org/m-GGUF", "Q2_K")
    assert find("org/Model@other") == HubRef("org/Model", revision="other")


def test_parts_of_a_download_are_not_a_model(
    hub_repo: Make, safetensors_files: dict[str, bytes]
) -> None:
    del safetensors_files["tokenizer.json"]
    hub_repo("org/a", safetensors_files)
    hub_repo("org/b", {"b-Q4_0-00001-of-00002.gguf": b"1"})
    gone = hub_repo("org/c", {"c-Q4_0.gguf": b"2"})
    (gone / "c-Q4_0.gguf").resolve().unlink()
    assert names("huggingface") == []
    assert find("org/b:Q4_0") == HubRef("org/b", "Q4_0")


def test_revisions(hub_repo: Make) -> None:
    old = hub_repo("org/r", {"m-Q4_0.gguf": b"old"}, commit="b" * 40, ref="v1")
    new = hub_repo("org/r", {"m-Q4_0.gguf": b"new"})
    assert resolve("org/r").path.parent == new
    assert resolve("org/r@v1").path.parent == old
    assert resolve(f"org/r@{'b' * 40}").path.parent == old
    (new.parent.parent / "refs" / "main").write_text("../../../../etc")
    assert find("org/r") == HubRef("org/r")


def test_llama_cpp_downloads_in_the_same_layout(
    home: Path, hub_repo: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_repo("org/r", {"m-Q4_0.gguf": b"x"})
    (home / ".cache/huggingface/hub").rename(home / "elsewhere")
    assert names("huggingface") == []
    monkeypatch.setenv("LLAMA_CACHE", str(home / "elsewhere"))
    assert names("huggingface") == ["org/r:Q4_0"]


def _only(name: str) -> InstalledModel:
    return next(m for m in installed() if m.name == name)


def test_remove_takes_a_quantization_and_its_blob_only(hub_repo: Make) -> None:
    old = hub_repo("org/r", {"m-Q4_0.gguf": b"shared"}, commit="b" * 40, ref="v1")
    new = hub_repo("org/r", {"m-Q4_0.gguf": b"shared", "m-Q8_0.gguf": b"88888"})
    assert remove(_only("org/r:Q8_0")) == 5
    assert names("huggingface") == ["org/r:Q4_0"]
    assert remove(_only("org/r:Q4_0")) == 0  # the older revision still has that blob
    assert (old / "m-Q4_0.gguf").is_file()
    assert not (new / "m-Q4_0.gguf").exists()


def test_remove_the_last_takes_the_repository(
    hub_repo: Make, safetensors_files: dict[str, bytes]
) -> None:
    folder = hub_repo("org/m", safetensors_files)
    assert remove(_only("org/m")) >= sum(map(len, safetensors_files.values()))
    assert not folder.parent.parent.exists()


def test_remove_keeps_off_other_stores(ollama_model: Make, tmp_path: Path) -> None:
    ollama_model()
    for model in (
        _only("ollama:llama3.1:8b"),
        InstalledModel("x", tmp_path / "x", "huggingface", 1),
    ):
        with pytest.raises(InvalidRequest):
            remove(model)
    assert names("ollama") == ["ollama:llama3.1:8b"]


# --- Ollama


def test_ollama_is_used_in_place(home: Path, ollama_model: Make) -> None:
    ollama_model()
    ollama_model("registry.ollama.ai/jane/tuned/latest", b"GGUF2")
    ollama_model("hf.co/org/repo-GGUF/Q4_K_M", b"GGUF33")
    found = resolve("ollama:llama3.1:8b")
    assert found.path.read_bytes() == b"GGUF"
    assert found.name == "ollama:llama3.1:8b"
    assert resolve("llama3.1:8b") == found
    assert resolve("ollama:jane/tuned").path.read_bytes() == b"GGUF2"
    assert resolve("hf.co/org/repo-GGUF:Q4_K_M").path.read_bytes() == b"GGUF33"
    assert names("ollama") == [
        "ollama:hf.co/org/repo-GGUF:Q4_K_M", "ollama:jane/tuned:latest", "ollama:llama3.1:8b",
    ]  # fmt: skip
    for name in names("ollama"):
        assert resolve(name).path.is_file()


@pytest.mark.parametrize(
    "name", ["../../x", "a/b/c/d", "a/../../b", "/etc/passwd", ":", "", "a:b/../c", "..:8b", "a b"]
)
def test_ollama_names_stay_in_the_store(home: Path, name: str) -> None:
    with pytest.raises((InvalidRequest, ModelNotFound)):
        resolve(f"ollama:{name}")


@pytest.mark.parametrize(
    ("digest", "error"),
    [
        ("sha256:../../../../etc/passwd", FormatError),
        ("sha256:" + "g" * 64, FormatError),
        ("md5:" + "0" * 32, FormatError),
        (17, FormatError),
        ("sha256:" + "1" * 64, ModelNotFound),
    ],
)
def test_ollama_hostile_digests(
    home: Path, ollama_model: Make, digest: object, error: type[Exception]
) -> None:
    manifest = ollama_model()
    document = json.loads(manifest.read_text())
    document["layers"][1]["digest"] = digest
    manifest.write_text(json.dumps(document))
    with pytest.raises(error):
        resolve("ollama:llama3.1:8b")
    assert names("ollama") == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"layers": 3}', '{"layers": [3]}', "\xff\xfe"])
def test_ollama_damaged_manifests(home: Path, ollama_model: Make, text: str) -> None:
    ollama_model().write_text(text, "latin-1")
    with pytest.raises(FormatError, match="ollama pull"):
        resolve("ollama:llama3.1:8b")


def test_ollama_loose_tensors(home: Path, ollama_model: Make) -> None:
    ollama_model().write_text('{"layers": [{"mediaType": "application/vnd.ollama.image.tensor"}]}')
    with pytest.raises(UnsupportedModel, match="loose tensors"):
        resolve("ollama:llama3.1:8b")


# --- LM Studio and llama.cpp


@pytest.mark.parametrize("root", [".lmstudio", ".cache/lm-studio", "moved"])
def test_lmstudio(home: Path, root: str) -> None:
    if root == "moved":
        (home / ".lmstudio-home-pointer").write_text(f"{home / root}\n")
    folder = home / root / "models/org/m-GGUF"
    folder.mkdir(parents=True)
    (folder / "m-Q4_K_M.gguf").write_bytes(b"abc")
    (folder / "mmproj-m.gguf").write_bytes(b"p")
    assert [(m.name, m.bytes) for m in installed() if m.source == "lmstudio"] == [
        ("org/m-GGUF:Q4_K_M", 3)
    ]
    assert resolve("org/m-GGUF").path == folder / "m-Q4_K_M.gguf"


def test_llama_cpp_flat(home: Path) -> None:
    folder = home / ".cache/llama.cpp"
    folder.mkdir(parents=True)
    (folder / "org_m-GGUF_m-Q4_K_M.gguf").write_bytes(b"abc")
    (folder / "org_m-GGUF_m-Q4_K_M.gguf.json").write_bytes(b"{}")
    assert names("llama.cpp") == ["org_m-GGUF_m-Q4_K_M"]
    for name in ("org_m-GGUF_m-Q4_K_M", "org/m-GGUF", "org/m-GGUF:q4_k_m"):
        assert resolve(name).path == folder / "org_m-GGUF_m-Q4_K_M.gguf"


# --- names that are close


def test_near_names(home: Path, ollama_model: Make, hub_repo: Make) -> None:
    ollama_model()
    hub_repo("org/Qwen3-4B-GGUF", {"Qwen3-4B-Q4_K_M.gguf": b"x"})
    with pytest.raises(ModelNotFound, match=r"did you mean ollama:llama3.1:8b\?.*rl-mlx pull"):
        resolve("lama3.1")
    with pytest.raises(ModelNotFound, match=r"did you mean ollama:llama3.1:8b\?.*ollama pull"):
        resolve("ollama:llama3.1:9b")
    with pytest.raises(ModelNotFound, match=r"did you mean org/Qwen3-4B-GGUF:Q4_K_M"):
        resolve("qwen3-4b")
