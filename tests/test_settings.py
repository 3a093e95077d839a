"""Settings: flags over environment over file over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.errors import InvalidRequest
from rl_mlx.settings import ModelSettings, config_path, load_settings, parse_memory


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"RL_MLX_CONFIG": str(tmp_path / "config.toml")}


def write(environ: dict[str, str], text: str) -> None:
    Path(environ["RL_MLX_CONFIG"]).write_text(text, "utf-8")


def test_defaults(environ: dict[str, str]) -> None:
    assert load_settings({}, environ) == ModelSettings()


def test_each_source_is_over_the_next(environ: dict[str, str]) -> None:
    write(environ, 'backend = "mlx"\ncontext = 1\nkv_bits = 8\n')
    environ |= {"RL_MLX_CONTEXT": "2", "RL_MLX_KV_BITS": "6", "RL_MLX_DRAFT": ""}
    environ["RL_MLX_PARALLEL"] = "3"
    flags = {"kv_bits": 4, "context": None}
    wanted = ModelSettings(backend="mlx", context=2, kv_bits=4, parallel=3)
    assert load_settings(flags, environ) == wanted


def test_options_of_a_backend_are_merged_one_by_one(environ: dict[str, str]) -> None:
    write(environ, "[backend_options]\nthreads = 2\nbatch = 64\n")
    flags = {"backend_options": {"threads": 4}}
    assert load_settings(flags, environ).backend_options == {"threads": 4, "batch": 64}
    assert load_settings({}, environ).backend_options == {"threads": 2, "batch": 64}
    write(environ, "backend_options = 3\n")
    with pytest.raises(InvalidRequest, match="backend_options must be a table"):
        load_settings({}, environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contxt = 3", "unknown setting 'contxt'"),
        ("context = ", "cannot read the settings"),
        ('context = "3"', "context must be at least 1 token"),
        ("kv_bits = 5", "kv_bits must be 4, 6 or 8"),
        ('dtype = "int8"', "dtype must be one of"),
        ('prefix_cache = "80%"', "prefix_cache must look like 12GB or 12GiB, not '80%'"),
        ("prefix_cache = 0", "prefix_cache must be above 0"),
        ("[backend]\nname = 1", "backend"),
        ("draft = 3", "draft"),
        ("parallel = 0", "parallel must be between 1 and 255, not 0"),
        ("parallel = 256", "parallel must be between 1 and 255, not 256"),
    ],
)
def test_a_bad_file(environ: dict[str, str], text: str, message: str) -> None:
    write(environ, text)
    with pytest.raises(InvalidRequest, match=message):
        load_settings({}, environ)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = " + b"[" * 50_000])
def test_a_file_that_is_no_text(environ: dict[str, str], content: bytes) -> None:
    Path(environ["RL_MLX_CONFIG"]).write_bytes(content)
    with pytest.raises(InvalidRequest, match="cannot read the settings"):
        load_settings({}, environ)


@pytest.mark.parametrize(
    "bad", [{"context": True}, {"context": 1.5}, {"backend": None}, {"backend_options": 3}]
)
def test_bad_values(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        ModelSettings(**bad)


def test_a_bad_variable(environ: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="RL_MLX_CONTEXT must be a whole number, not 'many'"):
        load_settings({}, environ | {"RL_MLX_CONTEXT": "many"})


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert config_path({}) == Path("/home/someone/.config/rl-mlx/config.toml")
    assert config_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/rl-mlx/config.toml")
    assert config_path({"RL_MLX_CONFIG": "/y.toml", "XDG_CONFIG_HOME": "/x"}) == Path("/y.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (8_000_000_000, 8_000_000_000), ("8GB", 8 * 10**9), ("8 GiB", 8 * 2**30), ("8g", 8 * 10**9),
        ("1.5t", 1_500_000_000_000), ("512MiB", 2**29), ("123", 123), ("75%", 750), ("0.1%", 1),
    ],
)  # fmt: skip
def test_memory(text: int | str, size: int) -> None:
    assert parse_memory(text, total=1000) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "-1", "0", 0, -5, 10**400, "0%", "8XB", "1e9", "9" * 400, True]
)
def test_memory_that_is_none(text: Any) -> None:
    with pytest.raises(InvalidRequest, match="memory must"):
        parse_memory(text, total=1000)


@given(st.integers(1, 1 << 50))
def test_bytes_are_bytes(count: int) -> None:
    assert parse_memory(count, total=1) == parse_memory(str(count), total=1) == count
