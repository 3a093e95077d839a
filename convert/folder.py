"""A Hugging Face or MLX folder: config.json and safetensors, in one file or many."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_mlx.convert import floats, layout
from rl_mlx.convert.families import internlm2
from rl_mlx.convert.hfconfig import bilingual
from rl_mlx.convert.lazy import FLOATS, Array, Arrays, Lazy
from rl_mlx.convert.prequantized import plain, with_settings
from rl_mlx.convert.safetensors import SafetensorsFile
from rl_mlx.convert.sanitize import sanitize
from rl_mlx.convert.shapes import Shape
from rl_mlx.convert.weights import Dense, FloatType, Mode, Packed, Tensor, Weights
from rl_mlx.errors import FormatError, ModelNotFound, UnsupportedModel

_INDEX = "model.safetensors.index.json"
_AFFINE_BITS, _AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
_BLOCKFLOATS: Mapping[tuple[int, int], Mode] = MappingProxyType(
    {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
)


class FolderWeights(Weights):
    """The weights of a folder as ``transformers``, ``mlx_lm`` or the converter here save it.

    Families that ``layout`` knows come in canonical names and are checked against the config;
    others keep the names of their files. ``config`` is that of the folder, ``hfconfig.bilingual``.
    What GPTQ, AWQ, compressed-tensors, modelopt and others have quantized comes as ``prequantized``
    says.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` by its headers.

        Raises ``ModelNotFound`` where the folder or a file of it is missing, ``FormatError`` where
        a file is damaged or contradicts the config, and ``UnsupportedModel`` where the weights are
        in a form that nobody here reads.
        """
        self.path = path
        config = with_settings(path, _read_json(path / "config.json"))
        self._files = _open_shards(path)
        arrays = _arrays(self._files)
        try:
            if config.get("model_type") == internlm2.MODEL_TYPE:
                config, arrays = internlm2.as_llama(config, arrays)
            self.config = _complete(config, arrays)
            known = layout.knows(self.config)
            if known and "quantization" not in self.config and _quant_method(self.config):
                arrays = plain(self.config, arrays)
            self._arrays = sanitize(self.config, arrays) if known else arrays
            expected = layout.layout(self.config, len(arrays)) if known else {}
            self._packings = _packings(self.config, self._arrays, expected)
        except (FormatError, UnsupportedModel) as error:
            raise type(error)(f"{path}: {error}") from error
        except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise FormatError(
                f"{path / 'config.json'}: a value cannot be right: {error!r}"
            ) from error
        companions = {f"{m}.{part}" for m in self._packings for part in ("scales", "biases")}
        self._names = [name for name in self._arrays if name not in companions]
        if known:
            layout.check(path, expected, {name: self.shape(name) for name in self._names})

    def names(self) -> list[str]:
        """See ``Weights``."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Weights``."""
        shape = self._arrays[name].shape
        packing = self._packing(name)
        return (*shape[:-1], shape[-1] * 32 // packing.bits) if packing else shape

    def nbytes(self, name: str, *, exact: bool = False) -> int:  # noqa: ARG002
        """See ``Weights``; what lies in a folder is exact as it is."""
        array, packing = self._arrays[name], self._packing(name)
        if packing is None:
            return math.prod(array.shape) * (4 if array.dtype == "F32" else 2)
        groups = math.prod(array.shape) * 32 // packing.bits // packing.group_size
        return math.prod(array.shape) * 4 + groups * (8 if packing.mode == "affine" else 1)

    def dtype(self, name: str) -> FloatType | None:
        """The float type that ``name`` is stored in, None for a packed tensor; costs no reading."""
        return None if self._packing(name) else self._float_type(name)

    def load(self, name: str, scales: FloatType = "float32", *, exact: bool = False) -> Tensor:  # noqa: ARG002
        """See ``Weights``; scales too large for the type asked for are given in float32.

        Raises ``UnsupportedModel`` for a tensor of another type than float32, float16, bfloat16.
        """
        packing = self._packing(name)
        if packing is None:
            dtype = self._float_type(name)
            return Dense(_settled(self._arrays[name].read()), dtype)
        module = name.removesuffix(".weight")
        weight = _settled(self._arrays[name].read())
        parts = [f"{module}.scales", f"{module}.biases"]
        if packing.mode != "affine":
            blocks = _settled(self._arrays[parts[0]].read())
            return Packed(
                weight, blocks, None, packing.bits, packing.group_size, packing.mode, scales
            )
        found = [floats.widen(self._arrays[part].read(), self._float_type(part)) for part in parts]
        with np.errstate(over="ignore"):
            pair = [floats.narrow(values, scales) for values in found]
        if any(
            not _fits(values, narrow, scales) for values, narrow in zip(found, pair, strict=True)
        ):
            pair, scales = found, "float32"
        return Packed(weight, pair[0], pair[1], packing.bits, packing.group_size, "affine", scales)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(file.path for file in self._files)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as it lies in the folder, scales in their own type.

        All axes but the last count as one; the result has two.
        """
        packing = self._packing(name)
        if packing is None:
            return Dense(_settled(self._arrays[name].rows(start, stop)), self._float_type(name))
        module = name.removesuffix(".weight")
        weight, scales = (
            _settled(self._arrays[f"{module}.{part}"].rows(start, stop))
            for part in ("weight", "scales")
        )
        biases, dtype = None, self.scale_type(name)
        if packing.mode == "affine":
            biases = self._arrays[f"{module}.biases"].rows(start, stop)
            kind = self._float_type(f"{module}.biases")
            biases = floats.narrow(floats.widen(biases, kind), dtype)
        return Packed(weight, scales, biases, packing.bits, packing.group_size, packing.mode, dtype)

    def packing(self, name: str) -> tuple[int, int, Mode] | None:
        """Bits, group size and mode of a packed tensor, None for a dense one."""
        packing = self._packing(name)
        return (packing.bits, packing.group_size, packing.mode) if packing else None

    def scale_type(self, name: str) -> FloatType:
        """The float type of a packed tensor's scales; float32 where they are no floats."""
        scales = self._arrays[f"{name.removesuffix('.weight')}.scales"]
        return FLOATS.get(scales.dtype, "float32")

    def release(self) -> None:
        """See ``Weights``."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """See ``Weights``."""
        for file in self._files:
            file.close()

    def _packing(self, name: str) -> _Packing | None:
        module, _, kind = name.rpartition(".")
        return self._packings.get(module) if kind == "weight" else None

    def _float_type(self, name: str) -> FloatType:
        dtype = self._arrays[name].dtype
        if dtype not in FLOATS:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is of type {dtype}, which is not supported; "
                "use a float16, bfloat16, MLX or GGUF version of the model"
            )
        return FLOATS[dtype]


@dataclass(frozen=True)
class _Packing:
    bits: int
    group_size: int
    mode: Mode


def _settled(array: Array) -> Array:
    """In rows, and aligned as its type asks; without a copy where it is so already."""
    return np.require(array, requirements=["C", "A"])


def _fits(wide: Array, narrow: Array, dtype: FloatType) -> bool:
    return bool((np.isfinite(floats.widen(narrow, dtype)) | ~np.isfinite(wide)).all())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: there is no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: must be a JSON object")
    return value


def _open_shards(path: Path) -> list[SafetensorsFile]:
    if not (path / _INDEX).is_file():
        whole = path / "model.safetensors"
        paths = [whole] if whole.is_file() else sorted(path.glob("model*.safetensors"))
        if not paths:
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
            kind = (
                "only PyTorch pickles, which can run code" if pickled else "no model*.safetensors"
            )
            raise ModelNotFound(f"{path}: the folder has {kind}; download the safetensors files")
        return [SafetensorsFile.open(p) for p in paths]
    places = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(_is_file_name(p) for p in places.values()):
        raise FormatError(f"{path / _INDEX}: its weight_map must name a file for each tensor")
    files = {name: SafetensorsFile.open(path / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in files[name].tensors:
            raise FormatError(
                f"{path / name}: tensor {tensor!r} is missing, which {_INDEX} places there; "
                "download the model again"
            )
    return list(files.values())


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _arrays(files: list[SafetensorsFile]) -> Arrays:
    arrays: Arrays = {}
    for file in files:
        for name, entry in file.tensors.items():
            if name in arrays:
                raise FormatError(f"{file.path}: tensor {name!r} is in another file too")
            arrays[name] = Lazy(entry.shape, entry.dtype, _reader(file, name))
    return arrays


def _reader(file: SafetensorsFile, name: str) -> Any:
    return lambda: file.array(name)


def _complete(config: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    """The config in both dialects, with what it leaves to be seen in the tensors."""
    full = bilingual(config)
    if not isinstance(full.get("model_type"), str):
        raise FormatError("config.json has no 'model_type'; use another version of the model")
    if full.get("quantization") is None and layout.knows(full):
        full.pop("quantization", None)
        if _quant_method(full) == "mxfp4" and full["model_type"] == "gpt_oss":
            full["quantization"] = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    if full.get("tie_word_embeddings") is None:
        full["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in arrays)
    return full


def _quant_method(config: Mapping[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method", "an unknown method")) if isinstance(found, dict) else None


def _packings(
    config: Mapping[str, Any], arrays: Arrays, expected: Mapping[str, Shape]
) -> dict[str, _Packing]:
    """How each packed module is packed; a module is packed where it has scales and words."""
    settings = config.get("quantization") or {}
    packings = {}
    for name, scales in arrays.items():
        module = name.removesuffix(".scales")
        weight = arrays.get(f"{module}.weight")
        if module == name or weight is None or weight.dtype != "U32":
            continue
        shape = expected.get(f"{module}.weight")
        packing = _packing_of(settings, module, weight, scales, shape)
        if packing is not None:
            _check_packing(module, packing, weight, scales, arrays.get(f"{module}.biases"))
            packings[module] = packing
    return packings


def _packing_of(
    settings: Mapping[str, Any], module: str, weight: Lazy, scales: Lazy, shape: Shape | None
) -> _Packing | None:
    """The module's own setting, else what its shape says, else the setting of all."""
    own = settings.get(module)
    if not isinstance(own, dict):
        if shape is not None and shape[-1] and scales.shape and scales.shape[-1]:
            bits, group = weight.shape[-1] * 32 // shape[-1], shape[-1] // scales.shape[-1]
            mode = _BLOCKFLOATS.get((bits, group)) if scales.dtype == "U8" else None
            return _Packing(bits, group, mode or "affine")
        own = settings
    if "bits" not in own:
        return None
    return _Packing(own["bits"], own.get("group_size", 64), own.get("mode", "affine"))


def _check_packing(
    module: str, packing: _Packing, weight: Lazy, scales: Lazy, biases: Lazy | None
) -> None:
    bits, group = packing.bits, packing.group_size
    affine = packing.mode == "affine"
    known = bits in _AFFINE_BITS and group in _AFFINE_GROUPS
    if not (known if affine else _BLOCKFLOATS.get((bits, group)) == packing.mode):
        raise UnsupportedModel(
            f"{module!r} is quantized in mode {packing.mode!r}, {bits} bits in groups of {group}, "
            "which MLX does not know"
        )
    columns, rest = divmod(weight.shape[-1] * 32, bits)
    groups = (*weight.shape[:-1], columns // group)
    if rest or columns % group or scales.shape != groups:
        raise FormatError(
            f"tensor '{module}.scales' must be {list(groups)} by its weight and quantization, "
            f"but is {list(scales.shape)}"
        )
    if (groups if affine else None) != (biases.shape if biases else None):
        must = f"be {list(groups)}, as its scales are" if affine else "not be there"
        raise FormatError(f"tensor '{module}.biases' must {must}, in mode {packing.mode!r}")
    if (scales.dtype == "U8") == affine:
        raise FormatError(
            f"tensor '{module}.scales' cannot be {scales.dtype} in mode {packing.mode!r}"
        )
