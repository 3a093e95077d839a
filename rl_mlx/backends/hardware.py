"""What this machine has, what the backends can use of it, and the command that would make it
faster.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass

from rl_mlx.backends import machine
from rl_mlx.backends.llamacpp.library import (
    GPU_KINDS,
    INSTALL_NATIVE,
    NATIVE,
    VERSION,
    open_library,
)
from rl_mlx.backends.machine import Gpu
from rl_mlx.errors import BackendUnavailable

# The binding's own index of wheels, by acceleration; its releases there have the same numbers.
_WHEELS = "https://xorbitsai.github.io/xllamacpp/whl"
_SWITCH = f"pip install --force-reinstall --no-deps xllamacpp=={VERSION} --index-url {_WHEELS}"
_AVX512 = {"avx512f", "avx512bw", "avx512vl"}


@dataclass(frozen=True)
class Device:
    """What a backend can compute on. ``acceleration`` is CUDA, ROCm, Vulkan, Metal or CPU; sizes in
    bytes.
    """

    name: str
    description: str
    acceleration: str
    memory_free: int
    memory_total: int


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works here; ``reason`` says why not, with the fix."""

    name: str
    available: bool
    version: str = ""
    devices: tuple[Device, ...] = ()
    reason: str = ""

    @property
    def acceleration(self) -> str:
        """The best of its devices: a GPU's, else CPU."""
        kinds = [d.acceleration for d in self.devices if d.acceleration != "CPU"]
        return kinds[0] if kinds else "CPU"


@dataclass(frozen=True)
class Report:
    """What this machine has. Each line of ``advice`` ends with a command."""

    system: str
    cpu: str
    cores: int
    memory_total: int
    memory_available: int
    gpus: tuple[Gpu, ...]
    mlx: BackendStatus
    llamacpp: BackendStatus
    advice: tuple[str, ...]


def report() -> Report:
    """Look at everything. Loads llama.cpp's library and MLX, if they are there."""
    mlx, llamacpp = mlx_status(), llamacpp_status()
    gpus = tuple(machine.gpus())
    return Report(
        system=f"{platform.system()} {platform.machine()}",
        cpu=machine.cpu_name(),
        cores=machine.physical_cores(),
        memory_total=machine.memory_total(),
        memory_available=machine.memory_available(),
        gpus=gpus,
        mlx=mlx,
        llamacpp=llamacpp,
        advice=tuple(advise(gpus, mlx, llamacpp, machine.instructions())),
    )


def llamacpp_status() -> BackendStatus:
    """Whether llama.cpp's binding loads, and the devices it offers."""
    try:
        library = open_library()
    except BackendUnavailable as error:
        return BackendStatus("llama.cpp", available=False, reason=str(error))
    devices = tuple(
        Device(name, description, _acceleration(backend, kind), free, total)
        for name, description, backend, kind, free, total in library.devices()
    )
    binding = library.binding
    version = f"{binding.package} {binding.version}"
    return BackendStatus("llama.cpp", available=True, version=version, devices=devices)


def mlx_status() -> BackendStatus:
    """Whether MLX loads, and the device it computes on."""
    if importlib.util.find_spec("mlx") is None:
        return BackendStatus(
            "mlx",
            available=False,
            reason="MLX is not installed; install it: pip install mlx mlx-lm",
        )
    try:
        import mlx.core as mx  # noqa: PLC0415  (only to look whether it can be loaded)
    except ImportError as error:
        return BackendStatus("mlx", available=False, reason=f"MLX cannot be loaded: {error}")
    is_gpu = mx.default_device() != mx.Device(mx.cpu)
    kind = ("Metal" if sys.platform == "darwin" else "CUDA") if is_gpu else "CPU"
    total = machine.memory_total()
    device = Device(kind, machine.cpu_name(), kind, machine.memory_available(), total)
    version = importlib.metadata.version("mlx")
    return BackendStatus("mlx", available=True, version=version, devices=(device,))


def advise(
    gpus: tuple[Gpu, ...], mlx: BackendStatus, llamacpp: BackendStatus, flags: frozenset[str]
) -> list[str]:
    """What would make this machine faster, each with the command that does it."""
    lines = [s.reason for s in (mlx, llamacpp) if not s.available]
    vendors = {gpu.vendor for gpu in gpus}
    if not llamacpp.available or llamacpp.acceleration != "CPU" or "Apple" in vendors:
        return lines
    if "NVIDIA" in vendors:
        lines.append(f"an NVIDIA GPU is not used; CUDA 12.8: {_SWITCH}/cu128")
        lines.append(f"CUDA 13.2: {_SWITCH}/cu132; MLX on CUDA: pip install 'rl-mlx[cuda]'")
    if "AMD" in vendors:
        lines.append(f"an AMD GPU is not used; ROCm: {_SWITCH}/rocm-7.2.4; else: {_SWITCH}/vulkan")
    if vendors == {"Intel"}:
        lines.append(f"an Intel GPU is not used; it may help: {_SWITCH}/vulkan")
    if not vendors and flags >= _AVX512 and not llamacpp.version.startswith(NATIVE.package):
        lines.append(
            "this CPU has AVX-512, which the wheel of llama.cpp does not use; compile it for this "
            "one (about 15 minutes on two cores, needs a C++ compiler; prompts and batches then "
            f"take about 0.6 of the time): {INSTALL_NATIVE}"
        )
    return lines


def _acceleration(backend: str, kind: int) -> str:
    names = {"HIP": "ROCm", "MTL": "Metal", "Metal": "Metal", "CUDA": "CUDA", "Vulkan": "Vulkan"}
    return names.get(backend, backend) if kind in GPU_KINDS else "CPU"
