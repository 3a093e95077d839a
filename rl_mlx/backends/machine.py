"""What this machine is: cores, instructions, memory, graphics cards. Reads files; starts and
imports nothing.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# What llama.cpp's x86-64 wheels are compiled for; without these the process would die of SIGILL.
_WHEEL_NEEDS = ("avx2", "fma", "f16c", "bmi2")
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


@dataclass(frozen=True)
class Gpu:
    """A graphics card seen on the bus, whether or not any backend can use it. ``name`` may be just
    the vendor.
    """

    vendor: str
    name: str


def physical_cores() -> int:
    """Cores this process may use: without hyper-threads, inside its affinity mask and cgroup's CPU
    quota.
    """
    allowed = _affinity()
    cores = len(allowed) or os.cpu_count() or 1
    if sys.platform == "darwin":
        cores = int(_sysctl("hw.physicalcpu") or cores)
    elif allowed:
        folder = Path("/sys/devices/system/cpu")
        siblings = {_read(folder / f"cpu{n}/topology/thread_siblings_list") or n for n in allowed}
        cores = len(siblings)
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, round(quota)))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if sys.platform == "linux" else set()


def cpu_quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """CPUs that the cgroup (v2 or v1) grants, or None where there is no limit."""
    limits = []
    for folder in _cgroups(root, own):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            limits.append(int(words[0]) / int(words[1]))
    quota, period = (_read(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_total(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory this process may use: the machine's, or its cgroup's limit where that is
    lower.
    """
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    limits = [_meminfo("MemTotal")]
    limits += [
        int(_read(f / "memory.max") or 0)
        for f in _cgroups(root, own)
        if _read(f / "memory.max").isdigit()
    ]
    return min((n for n in limits if n > 0), default=0)


def memory_available() -> int:
    """Bytes that could be taken now without swapping."""
    if sys.platform == "darwin":  # what is free changes too fast there to be worth asking for
        return memory_total()
    return min(_meminfo("MemAvailable"), memory_total())


def cpu_name() -> str:
    """The processor as it calls itself."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("model name", "Hardware", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


@functools.cache
def instructions() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty where they cannot be known."""
    if sys.platform == "darwin":
        text = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}"
        return frozenset(text.lower().split())
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def missing_instructions() -> list[str]:
    """Instructions that llama.cpp's wheel uses and this CPU lacks; empty where that is not known to
    be so.
    """
    flags = instructions()
    if platform.machine().lower() not in {"x86_64", "amd64"} or not flags:
        return []
    return [name.upper() for name in _WHEEL_NEEDS if name not in flags]


def gpus(bus: Path = Path("/sys/bus/pci/devices")) -> list[Gpu]:
    """Graphics cards of this machine."""
    if sys.platform == "darwin":
        return [Gpu("Apple", cpu_name())] if platform.machine() == "arm64" else []
    found = []
    for device in sorted(bus.iterdir()) if bus.is_dir() else []:
        vendor = _VENDORS.get(_read(device / "vendor"))
        if vendor and _read(device / "class").startswith(("0x0300", "0x0302", "0x0380")):
            found.append(Gpu(vendor, vendor))
    names = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    named = [Gpu("NVIDIA", _field(_read(path), "Model") or "NVIDIA") for path in names]
    return named + [gpu for gpu in found if gpu.vendor != "NVIDIA" or not named]


def _cgroups(root: Path, own: Path) -> list[Path]:
    """The cgroup v2 folders from this process's own up to the root."""
    line = next((x for x in _read(own).splitlines() if x.startswith("0::")), "0::/")
    folder = root / line[3:].lstrip("/")
    return [p for p in (folder, *folder.parents) if p == root or root in p.parents]


def _meminfo(name: str) -> int:
    words = _field(_read(Path("/proc/meminfo")), name).split()
    return int(words[0]) * 1024 if words else 0


def _field(text: str, name: str) -> str:
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
