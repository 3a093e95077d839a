"""Cores, limits and cards, from files that look like a machine's."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from rl_mlx.backends import hardware, machine
from rl_mlx.backends.choice import choose
from rl_mlx.backends.hardware import BackendStatus, Device, advise
from rl_mlx.backends.llamacpp import library
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
    assert "--no-binary xllamacpp" in line
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


def test_a_library_that_cannot_be_used_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        with pytest.raises(BackendUnavailable) as caught:
            library.open_library.__wrapped__()
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(library.importlib.util, "find_spec", lambda name: None)
        assert "pip install xllamacpp" in reason()
    pytest.importorskip("xllamacpp")
    with monkeypatch.context() as patch:
        patch.setattr(library.importlib.metadata, "version", lambda name: "1.0")
        assert "xllamacpp 1.0" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(library, "missing_instructions", lambda: ["AVX2"])
        assert "AVX2" in reason()
    with monkeypatch.context() as patch:
        patch.setitem(library._CONTEXT_DEFAULTS, "n_ctx", 513)
        assert "memory layout" in reason()

    def fail(path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(library.ctypes, "CDLL", fail)
        assert "apt-get install libgomp1" in reason()


def test_instructions_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"sse2", "fma", "f16c"}))
    assert machine.missing_instructions() == ["AVX2", "BMI2"]
    monkeypatch.setattr(machine, "instructions", frozenset)
    assert machine.missing_instructions() == []
