"""Which modules of a folder are quantized, and in which form: by the arrays that they have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl_mlx.convert.files import read_json
from rl_mlx.convert.lazy import Arrays, Lazy
from rl_mlx.convert.prequantized.integers import awq, gptq, packed_integers, whole_integers
from rl_mlx.convert.prequantized.parts import Module, float_type
from rl_mlx.convert.prequantized.small_floats import fp8, mxfp4, nvfp4
from rl_mlx.errors import UnsupportedModel

_METHODS = ("gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_QUANTIZED = {"qweight", "weight_packed", "weight_scale", "weight_scale_inv"}


# What tools wrote before config.json had a place for it: file, key of the settings, method.
_OLDER = (
    ("quantize_config.json", None, "gptq"),
    ("hf_quant_config.json", "quantization", "modelopt"),
)


def with_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the ``quantization_config`` that another file of the folder has."""
    if "quantization_config" in config or "quantization" in config:
        return config
    for name, key, method in _OLDER:
        found = read_json(folder / name)
        settings = found.get(key) if key else found
        if isinstance(settings, dict) and settings:
            return config | {"quantization_config": {"quant_method": method, **settings}}
    return config


def plain(config: Mapping[str, Any], arrays: Mapping[str, Lazy]) -> Arrays:
    """``arrays`` of a folder with a ``quantization_config``, under MLX's names and in its forms.

    Raises ``UnsupportedModel`` for a method or a form that is not known, and ``FormatError`` where
    the arrays of a module do not go together.
    """
    settings = config["quantization_config"]
    method = str(settings.get("quant_method", "an unknown method"))
    if method not in _METHODS:
        raise UnsupportedModel(
            f"its weights are quantized by {method}, which is not supported; "
            "use an unquantized, MLX or GGUF version of the model"
        )
    modules: dict[str, dict[str, Lazy]] = defaultdict(dict)
    for name, array in arrays.items():
        at, _, part = name.rpartition(".")
        modules[at][part] = array
    dtype = float_type(config)
    found: Arrays = {}
    for name, parts in modules.items():
        if _QUANTIZED & parts.keys():
            module = Module(name, parts, settings, dtype)
            found |= _form(module, method)(module)
        else:
            found |= {f"{name}.{part}" if name else part: array for part, array in parts.items()}
    return found


def _form(module: Module, method: str) -> Callable[[Module], Arrays]:
    if "qweight" in module.parts:
        return awq if method == "awq" else gptq
    if "weight_packed" in module.parts:
        if module["weight_packed"].dtype == "I32":
            return packed_integers
        return nvfp4 if module["weight_scale"].dtype == "F8_E4M3" else mxfp4
    kinds = {"F8_E4M3": fp8, "I8": whole_integers, "U8": nvfp4}
    kind = module["weight"].dtype
    if kind not in kinds:
        raise module.unsupported(f"weights of type {kind}")
    return kinds[kind]
