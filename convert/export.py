"""A Hugging Face folder becomes one GGUF file: streamed, exact, and never half there.

Floats keep their type (vectors and routers are widened to float32, as llama.cpp wants them);
nothing is quantized. The file appears under its name when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from rl_mlx.convert.floats import widen
from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.fields import ARCHITECTURES, INTERLEAVED, fields, rope_divisors
from rl_mlx.convert.gguf.names import gguf_name
from rl_mlx.convert.gguf.tokens import Vocabulary, read_vocabulary
from rl_mlx.convert.weights import Dense, FloatType, Weights
from rl_mlx.errors import DestinationExists, OutOfMemory, UnsupportedModel

OnProgress = Callable[[int, int], None]
_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
_HEADER_ROOM = 64 << 20  # metadata, tensor infos and padding: more than any vocabulary takes
_ALIGNMENT = 32


@dataclass(frozen=True)
class ExportReport:
    """What was written. ``exact`` says that every value is the one of the source."""

    path: Path
    tensors: int
    bytes: int
    exact: bool = True


@dataclass(frozen=True)
class _Plan:
    """One tensor of the file: its name there and here, its shape and the type it will have."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: FloatType

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * (4 if self.dtype == "float32" else 2)


def export(
    source: str | Path,
    destination: str | Path,
    *,
    force: bool = False,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Write the folder ``source`` as the GGUF file ``destination``.

    ``progress(done, total)`` is told in bytes. Raises ``DestinationExists`` without ``force``,
    ``UnsupportedModel`` for a family or container that has no way to GGUF yet, ``OutOfMemory``
    where the disk is too small, and ``ModelNotFound`` or ``FormatError`` for a bad source.
    """
    target = Path(destination)
    if target.exists() and not force:
        raise DestinationExists(f"{target} exists already; choose another name or use force")
    weights = FolderWeights(Path(source))
    try:
        metadata = fields(weights.config)
        plans = [_plan(weights, name) for name in weights.names()]
        total = sum(plan.nbytes for plan in plans)
        _check_disk(target, total + _HEADER_ROOM)
        with _replacing(target) as part:
            writer = gguf.GGUFWriter(part, ARCHITECTURES[weights.config["model_type"]])
            _describe(writer, weights, metadata)
            _write(writer, weights, plans, total, progress)
    finally:
        weights.close()
    return ExportReport(target, len(plans), target.stat().st_size)


def _plan(weights: FolderWeights, name: str) -> _Plan:
    dtype = weights.dtype(name)
    if dtype is None:
        raise UnsupportedModel(
            f"{weights.path}: quantized MLX weights cannot be exported to GGUF yet; "
            "take a float16 version"
        )
    shape = weights.shape(name)
    target = gguf_name(weights.config["model_type"], name)
    is_small = len(shape) == 1 or target.endswith("ffn_gate_inp.weight")
    return _Plan(target, name, shape, "float32" if is_small else dtype)


def _describe(writer: gguf.GGUFWriter, weights: Weights, metadata: dict[str, Any]) -> None:
    writer.add_type("model")
    writer.add_name(weights.path.resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        name = f"{writer.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, int(value))
    _describe_tokens(writer, read_vocabulary(weights.path, weights.config["vocab_size"]))


def _describe_tokens(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if not vocabulary.tokens:
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _write(
    writer: gguf.GGUFWriter,
    weights: Weights,
    plans: list[_Plan],
    total: int,
    progress: OnProgress | None,
) -> None:
    divisors = rope_divisors(weights.config)
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for plan in plans:
        kind = np.dtype(np.float32 if plan.dtype == "float32" else np.float16)
        writer.add_tensor_info(plan.name, plan.shape, kind, plan.nbytes, _TYPES[plan.dtype])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        done = 0
        for plan in plans:
            writer.write_tensor_data(_read(weights, plan))
            done += plan.nbytes
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _read(weights: Weights, plan: _Plan) -> npt.NDArray[Any]:
    """A tensor as it will lie in the file."""
    tensor = weights.load(plan.source)
    assert isinstance(tensor, Dense), "packed tensors are refused when the plan is made"
    array = tensor.array
    if tensor.dtype != plan.dtype:
        array = widen(array, tensor.dtype)
    if weights.config["model_type"] in INTERLEAVED:
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        match = re.search(r"self_attn\.([qk]_proj)\.", plan.source)
        if match:
            array = _interleaved(array, weights.config[heads[match[1]]])
    return np.ascontiguousarray(array)


def _interleaved(array: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of each head from half-split to interleaved rope order."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _check_disk(target: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OutOfMemory(
            f"{target} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; "
            "make room first"
        )


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A name beside ``target`` to write to; it becomes ``target`` when all went well, and else is
    removed.
    """
    for stale in target.parent.glob(f".{target.name}.*.part"):
        owner = stale.name.split(".")[-2]
        if owner.isdigit() and not _is_alive(int(owner)):
            stale.unlink(missing_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
