"""What fits: against arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx.backends.fit import WORK, Survey, bandwidth, budget, survey
from rl_mlx.backends.machine import memory_total
from rl_mlx.cli.main import main
from rl_mlx.convert import convert, inspect
from rl_mlx.convert.facts import Facts
from rl_mlx.errors import InvalidRequest, ModelNotFound
from tests.store.fakehub import FakeHub, serve

FACTS = Facts(
    format="GGUF v3", architecture="llama", parameters=8_000, weight_bytes=1000, active_bytes=250,
    types={"Q4_K": 8_000}, context=4096, layers=2, hidden=64, heads=4, kv_heads=2,
    kv_bytes_per_token=100, vocab=1000, tokenizer="gpt2", special_ids={}, chat_template=True,
)  # fmt: skip


@settings(deadline=None)
@given(
    st.integers(1, 1 << 40), st.integers(1, 1 << 20), st.integers(1, 1 << 41), st.floats(1e6, 1e12)
)
def test_what_fits_is_what_adds_up(size: int, context: int, room: int, speed: float) -> None:
    (fit,) = Survey("m", FACTS, {"Q4_0": size}).fits(context, room, speed)
    assert fit.memory == size + 100 * context + WORK
    assert fit.fits == (fit.memory <= room)
    assert fit.longest is not None
    assert fit.fits == (min(context, 4096) <= fit.longest and fit.memory <= room)
    assert 0 <= fit.longest <= 4096
    assert fit.longest == 0 or size + 100 * fit.longest + WORK <= room
    assert fit.tokens_per_second == pytest.approx(speed / (size / 4 + 100 * context))


def test_the_largest_comes_first_and_speed_has_a_word() -> None:
    found = Survey("m", FACTS, {"Q2_K": 4 * 10**9, "Q8_0": 16 * 10**9, "Q4_0": 8 * 10**9})
    fits = found.fits(1, 9 * 10**9, 30e9)
    assert [(f.name, f.fits) for f in fits] == [("Q8_0", False), ("Q4_0", True), ("Q2_K", True)]
    assert [f.speed for f in fits] == ["slow", *["as fast as people read"] * 2]
    unknown = Survey("m", replace(FACTS, kv_bytes_per_token=None), {"Q2_K": 1}).fits(9, 10**9, 1.0)
    assert unknown[0].longest is None


def test_the_budget_is_the_backends_own_or_what_is_asked_for() -> None:
    assert budget("2GB") == 2 * 10**9
    assert budget("50%") == memory_total() // 2
    assert 0 < budget(None) <= memory_total()
    with pytest.raises(InvalidRequest, match="12GB"):
        budget("much")
    assert bandwidth() > 1e6


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(quiet: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.mark.shared
def test_a_repository_of_quantizations(
    hub: FakeHub, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (shared / "quants" / "qwen3-Q4_K_M.gguf").read_bytes()
    hub.repos["org/m"] = {"m-Q4_K_M.gguf": content, "m-Q8_0.gguf": content + bytes(9 << 20)}
    found = survey("org/m")
    assert found.sizes == {"Q4_K_M": len(content), "Q8_0": len(content) + (9 << 20)}
    assert found.facts == inspect(shared / "quants" / "qwen3-Q4_K_M.gguf")
    assert survey("org/m:q8_0").sizes.keys() == {"Q8_0"}
    assert hub.sent < 4 << 20
    with pytest.raises(ModelNotFound, match="has no model"):
        survey("org/none")
    assert main(["fit", "org/m", "--context", "64", "--memory", "309MB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(f["name"], f["fits"]) for f in document["fits"]] == [("Q8_0", False), ("Q4_K_M", True)]
    assert (document["context"], document["budget"]) == (64, 309_000_000)
    assert main(["fit", "org/m", "--memory", "309MB"]) == 0
    out = capsys.readouterr().out
    assert "the largest that fits: Q4_K_M" in out
    assert main(["fit", "org/m", "--memory", "1MB"]) == 0
    assert "none fits" in capsys.readouterr().out
    assert main(["fit", "org/m", "--context", "0"]) == 2


@pytest.mark.shared
def test_files_beside_each_other_and_folders(quiet: Path, shared: Path) -> None:
    content = (shared / "quants" / "qwen3-Q4_0.gguf").read_bytes()
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "other-Q8_0.gguf"):
        (quiet / name).write_bytes(content)
    assert survey(str(quiet / "a-Q4_0.gguf")).sizes == dict.fromkeys(("Q4_0", "Q8_0"), len(content))
    found = survey(str(shared / "hf" / "qwen2"))
    assert list(found.sizes) == ["as it is", "q8", "q6", "q5", "q4", "q3", "q2"]
    assert found.sizes["as it is"] == found.facts.weight_bytes
    assert found.sizes["q4"] == int(found.facts.parameters * 4.5 / 8)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama"])
def test_experts_that_are_not_chosen_are_not_read(name: str, shared: Path, tmp_path: Path) -> None:
    facts = inspect(shared / "parity" / f"{name}.gguf")
    if name == "llama":
        assert facts.active_bytes == facts.weight_bytes
        return
    assert facts.active_bytes < facts.weight_bytes
    convert(shared / "parity" / f"{name}.gguf", tmp_path / "out")
    folder = inspect(tmp_path / "out")
    assert folder.active_bytes == pytest.approx(facts.active_bytes, rel=0.02)
