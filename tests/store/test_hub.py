"""Downloads, against a small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl_mlx.errors import ModelNotFound, OutOfMemory, RlMlxError
from rl_mlx.store import installed, resolve
from rl_mlx.store.hub import HubRef, choose, download
from tests.store.fakehub import FakeHub


def test_only_the_files_of_the_quantization(fake_hub: FakeHub) -> None:
    part = "Q8_0/m-Q8_0-0000{}-of-00002.gguf"
    fake_hub.repos["org/m"] = {
        part.format(1): b"one", part.format(2): b"two", "m-Q4_K_M.gguf": b"four", "README.md": b"r",
    }  # fmt: skip
    files = resolve("org/m:q8_0")
    assert files.name == "org/m:Q8_0"
    assert files.path.read_bytes() == b"one"
    assert (files.path.parent / "m-Q8_0-00002-of-00002.gguf").read_bytes() == b"two"
    assert {name for name, _ in fake_hub.asked} == {part.format(1), part.format(2)}
    fake_hub.shutdown()  # from here on there is no network
    assert resolve("org/m:Q8_0") == files
    assert [m.name for m in installed() if m.source == "huggingface"] == ["org/m:Q8_0"]


def test_a_folder_without_the_rest_of_the_repository(
    fake_hub: FakeHub, safetensors_files: dict[str, bytes]
) -> None:
    others = {"consolidated.safetensors": b"again", "pytorch_model.bin": b"p", "img/[1].png": b"i"}
    fake_hub.repos["org/m"] = {**safetensors_files, **others, "m-Q4_K_M.gguf": b"q"}
    folder = resolve("org/m").path
    assert sorted(p.name for p in folder.iterdir()) == sorted(safetensors_files)
    assert resolve("org/m:Q4_K_M").path == folder / "m-Q4_K_M.gguf"


def test_what_is_there_already_is_not_fetched_again(fake_hub: FakeHub) -> None:
    fake_hub.repos["org/m"] = {"m-Q4_K_M.gguf": b"four"}
    first = download(HubRef("org/m"))
    assert download(HubRef("org/m")) == first
    assert len(fake_hub.asked) == 1


def test_an_interrupted_download_goes_on(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 400
    fake_hub.repos["org/m"] = {"m-Q4_K_M.gguf": content}
    fake_hub.cuts = 1
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    try:
        files = resolve("org/m")
    except RlMlxError:  # older clients of the hub go on only when they are run again
        files = resolve("org/m")
    assert files.path.read_bytes() == content
    assert [bounds for _, bounds in fake_hub.asked] == ["", f"bytes={len(content) // 2}-"]


def test_a_download_that_never_ends_well(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.repos["org/m"] = {"a-Q4_0.gguf": b"x" * 1000}
    fake_hub.cuts = -1
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(RlMlxError, match=r"fetching org/m failed .*run this again"):
        resolve("org/m")
    assert not [m for m in installed() if m.source == "huggingface"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/none", "huggingface.co has no model org/none.*hf auth login"),
        ("org/gated", "org/gated is gated: accept its terms.*hf auth login"),
        ("org/m@v9", "org/m has no branch, tag or commit 'v9'"),
        ("org/m:Q2_K", "no 'Q2_K' in org/m; name one of these after a colon: Q4_0, Q8_0"),
        ("org/m", "more than one model in org/m.*Q4_0, Q8_0"),
        ("org/data", "neither GGUF nor safetensors"),
        ("org/part:Q4_0", "lacks parts of Q4_0"),
    ],
)
def test_what_the_hub_refuses(fake_hub: FakeHub, reference: str, message: str) -> None:
    fake_hub.repos["org/m"] = {"m-Q8_0.gguf": b"8", "m-Q4_0.gguf": b"4"}
    fake_hub.repos["org/data"] = {"x.parquet": b""}
    fake_hub.repos["org/part"] = {"p-Q4_0-00001-of-00002.gguf": b"1"}
    fake_hub.statuses["org/gated"] = (403, "GatedRepo")
    with pytest.raises(ModelNotFound, match=message) as caught:
        resolve(reference)
    assert "\n" not in str(caught.value)


def test_the_disk_is_looked_at_first(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.repos["org/m"] = {"m-Q4_K_M.gguf": b"x" * 2000}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1999))
    with pytest.raises(OutOfMemory, match="HF_HUB_CACHE"):
        resolve("org/m")
    assert fake_hub.asked == []


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(RlMlxError, match="fetching org/m failed"):
        resolve("org/m")


def test_ctrl_c_ends_a_download_at_once(fake_hub: FakeHub) -> None:
    fake_hub.repos["org/m"] = {"m-Q4_K_M.gguf": b"x" * 2000}
    fake_hub.pause = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-m", "rl_mlx.cli.main", "pull", "org/m"], stderr=subprocess.DEVNULL
    ) as process:
        assert fake_hub.paused.wait(20)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    fake_hub.pause.set()


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("org/repo", HubRef("org/repo")),
        ("org/repo:Q4_K_M", HubRef("org/repo", "Q4_K_M")),
        ("org/repo@v1:Q4_K_M", None),
        ("hf.co/org/repo:Q8_0", HubRef("org/repo", "Q8_0")),
        ("https://huggingface.co/org/repo", HubRef("org/repo")),
        ("https://huggingface.co/org/repo/tree/v2?x=1", HubRef("org/repo", None, "v2")),
        ("huggingface.co/o/r/resolve/main/Q8_0/m-00001-of-00002.gguf",
         HubRef("o/r", "m-00001-of-00002.gguf")),
        ("llama3.1:8b", None),
        ("a/b/c", None),
        ("../b", None),
    ],
)  # fmt: skip
def test_references(text: str, ref: HubRef | None) -> None:
    if text == "org/repo@v1:Q4_K_M":
        ref = HubRef("org/repo", "Q4_K_M", "v1")
    assert HubRef.parse(text) == ref


def test_a_part_names_the_whole() -> None:
    files = [f"Q8_0/m-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert choose(files, HubRef("o/r", "m-00001-of-00002.gguf"))[1] == files
