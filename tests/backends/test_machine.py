"""Cores, limits and cards, from files that look like a machine's."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl_mlx.backends import hardware, machine
from rl_mlx.backends.choice import choose
from rl_mlx.backends.hardware import BackendStatus, Device, advise
from rl_mlx.backends.llamacpp import library
from rl_mlx.backends.llamacpp.library import VERSION
from rl_mlx.backends.machine import Gpu
from rl_mlx.errors import BackendUnavailable, InvalidRequest
from rl_mlx.settings import ModelSettings

CPU = Device("CPU", "", "CPU", 1, 1)
LLAMACPP = BackendStatus("llama.cpp", available=True, devices=(CPU,))
MLX = BackendStatus("mlx", available=True, devices=(CPU,))


def test_the_quota_is_the_lowest_on_the_way_to_the_root(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    root = tmp_path / "fs"
    assert machine.cpu_quota(root, own) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(root, own) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota(root, own) == 1.5
    (inner / "memory.max").write_text("1000000\n")
    (inner.parent / "memory.max").write_text("max\n")
    if sys.platform == "linux":
        assert machine.memory_total(root, own) == 1_000_000


def test_the_quota_of_older_kernels(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(tmp_path, tmp_path / "none") is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    assert machine.cpu_quota(tmp_path, tmp_path / "none") == 2


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= machine.physical_cores() <= (os.cpu_count() or 1)
    assert 0 < machine.memory_available() <= machine.memory_total()
    assert machine.cpu_name()


def test_cards_on_the_bus(tmp_path: Path) -> None:
    cards = (("0x10de", "0x030200"), ("0x1002", "0x030000"), ("0x8086", "0x020000"))
    for name, (vendor, kind) in zip("012", cards, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    if sys.platform == "linux":
        assert {g.vendor for g in machine.gpus(tmp_path)} == {"NVIDIA", "AMD"}
        assert machine.gpus(tmp_path / "nothing") == [
            g for g in machine.gpus() if g.vendor == "NVIDIA" and g.name != "NVIDIA"
        ]


@pytest.mark.parametrize(
    ("vendor", "command"), [("NVIDIA", "/cu128"), ("AMD", "/rocm-7.2.4"), ("Intel", "/vulkan")]
)
def test_an_idle_card_is_worth_a_command(vendor: str, command: str) -> None:
    gpus = (Gpu(vendor, vendor),)
    assert command in " ".join(advise(gpus, MLX, LLAMACPP, frozenset()))
    card = Device("X0", "", "CUDA", 1, 1)
    busy = BackendStatus("llama.cpp", available=True, devices=(CPU, card))
    assert advise(gpus, MLX, busy, frozenset()) == []


def test_other_advice() -> None:
    avx512 = frozenset({"avx512f", "avx512bw", "avx512vl"})
    (line,) = advise((), MLX, LLAMACPP, avx512)
    assert line.endswith("pip install 'rl-mlx[native]'")
    native = replace(LLAMACPP, version=f"llama-cpp-python {library.NATIVE_VERSION}")
    assert advise((), MLX, native, avx512) == []
    assert advise((), MLX, LLAMACPP, frozenset({"avx2"})) == []
    broken = BackendStatus("llama.cpp", available=False, reason="install libgomp1")
    assert advise((Gpu("NVIDIA", ""),), MLX, broken, avx512) == ["install libgomp1"]


def test_the_report_is_whole() -> None:
    report = hardware.report()
    assert report.cores >= 1
    for status in (report.mlx, report.llamacpp):
        assert status.available == (not status.reason)
        assert not status.available or (status.version and status.devices)


@pytest.mark.parametrize(
    ("system", "kind", "first"),
    [("darwin", "arm64", "mlx"), ("darwin", "x86_64", "llama.cpp"),
     ("linux", "x86_64", "llama.cpp"), ("win32", "AMD64", "llama.cpp")],
)  # fmt: skip
def test_the_choice(system: str, kind: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: kind)
    choice = choose(ModelSettings())
    assert choice.names[0] == first
    assert set(choice.names) == {"mlx", "llama.cpp"}
    assert choice.why.startswith(first)
    assert choose(ModelSettings(backend="mlx")).names == ("mlx",)
    only = choose(ModelSettings(backend_options={"gpu_layers": 3}))
    assert only.names == ("llama.cpp",)
    assert "gpu_layers" in only.why
    with pytest.raises(InvalidRequest, match="known are auto"):
        choose(ModelSettings(backend="tpu"))


def find_only(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], path: str = "") -> None:
    """Let only these packages be installed, at ``path``."""

    def find_spec(name: str) -> SimpleNamespace | None:
        package = {"llama_cpp": "llama-cpp-python"}.get(name, name)
        return SimpleNamespace(origin=path) if package in versions else None

    monkeypatch.setattr(library.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(library.importlib.metadata, "version", versions.__getitem__)


def refusal() -> str:
    with pytest.raises(BackendUnavailable) as caught:
        library.open_library.__wrapped__()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_binding_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled one, unless it is another release: that is somebody else's."""
    wheel = {"xllamacpp": VERSION + "+cu128"}
    for versions, taken in (
        (wheel, library.WHEEL),
        ({**wheel, "llama-cpp-python": library.NATIVE_VERSION}, library.NATIVE),
        ({"llama-cpp-python": library.NATIVE_VERSION}, library.NATIVE),
        ({**wheel, "llama-cpp-python": "0.2.90"}, library.WHEEL),
    ):
        with monkeypatch.context() as patch:
            find_only(patch, versions, "somewhere/__init__.py")
            assert library._installed() is taken


def test_a_missing_binding_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for versions, reason in (
        ({}, "not installed"),
        ({"llama-cpp-python": "0.2.90"}, "not installed"),
        ({"xllamacpp": "1.0"}, "xllamacpp 1.0 is not the tested"),
        ({"xllamacpp": VERSION}, "has no library"),
    ):
        with monkeypatch.context() as patch:
            find_only(patch, versions, "/nowhere/__init__.py")
            assert reason in refusal()
            assert refusal().endswith(f"install it: pip install xllamacpp=={VERSION}")
    monkeypatch.setattr(sys, "platform", "win32")
    assert 'backend="http://127.0.0.1:8080"' in refusal()


def test_a_library_that_cannot_be_used_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")

    def fail(path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setitem(library._CONTEXT_DEFAULTS, "n_ctx", 513)
        assert "memory layout" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(library.ctypes, "CDLL", fail)
        assert "apt-get install libgomp1" in refusal()


def test_a_wheel_for_a_better_cpu_is_not_even_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise AssertionError("loading it would be SIGILL")

    find_only(monkeypatch, {"xllamacpp": VERSION}, "/nowhere/__init__.py")
    monkeypatch.setattr(library.ctypes, "CDLL", fail)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"sse2", "fma", "f16c"}))
    assert "AVX2, BMI2, which this CPU lacks" in refusal()
    assert refusal().endswith("pip install 'rl-mlx[native]'")


def test_instructions_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"sse2", "fma", "f16c"}))
    assert machine.missing_instructions() == ["AVX2", "BMI2"]
    monkeypatch.setattr(machine, "instructions", frozenset)
    assert machine.missing_instructions() == []
