"""``export``: an MLX or Hugging Face folder becomes one GGUF file, streamed, and never half there.

Which type a tensor has, unless ``quant`` says:

- plain floats keep theirs, and llama.cpp's float32 where it wants that (vectors, routers);
- what rl-mlx converted from GGUF gets the type it had there, where that holds it to the last bit;
- affine tensors get the smallest block type that holds them (``encode.EXACT``), its scales rounded
  to float16 where they are of another type and do not fit; those that none holds (6 and 8 bits with
  free biases) F16, and F32 where float16 would overflow;
- ``mxfp4`` and ``nvfp4`` keep their blocks, ``mxfp8`` becomes BF16.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.chunks import THREADS
from rl_mlx.convert.exported import ExportReport, measured
from rl_mlx.convert.fidelity import SAMPLE
from rl_mlx.convert.files import read_json
from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf import ggml
from rl_mlx.convert.gguf.changes import Change
from rl_mlx.convert.gguf.encode import DENSE, EXACT, encode, holds, surveys
from rl_mlx.convert.gguf.fields import fields, rope_tensors
from rl_mlx.convert.gguf.imatrix import Importance, read_imatrix
from rl_mlx.convert.gguf.mapping import architecture, change, changed_back, exported_config
from rl_mlx.convert.gguf.names import gguf_name
from rl_mlx.convert.gguf.recipes import ModelFacts, Recipe, needs_importance, recipe, tensor_types
from rl_mlx.convert.gguf.tokens import describe
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.gguf.writer import MetadataValue, TensorSpec, header, pad
from rl_mlx.convert.pieces import Source, source
from rl_mlx.convert.quantize import dequantize
from rl_mlx.convert.report import TensorReport
from rl_mlx.convert.staging import check_disk, new_file
from rl_mlx.convert.weights import Dense, Packed, Tensor
from rl_mlx.errors import (
    DestinationExists,
    FormatError,
    InvalidRequest,
)

F32 = npt.NDArray[np.float32]
OnProgress = Callable[[int, int], None]
T = GGMLType
_SLICE = 1 << 20  # weights that a thread works on at a time
_BATCH = 16  # slices after which the pages that were read are given back
_MARGIN = 16 << 20
_HALF_MAX = 65504.0
# The number that says of what type most of a file is, where no recipe made it.
_FILE_TYPES: Mapping[GGMLType, int] = MappingProxyType(
    {T.F32: 0, T.F16: 1, T.Q4_0: 2, T.Q4_1: 3, T.Q8_0: 7, T.Q5_0: 8, T.Q5_1: 9, T.BF16: 32}
    | {T.TQ2_0: 37, T.MXFP4: 38, T.NVFP4: 39, T.Q1_0: 40}
)
_ALWAYS_F32 = re.compile(r".*(_norm\.weight|ffn_gate_inp\.weight|conv1?d?\.weight|\.bias|ssm_[ad])")


def export(
    source: str | Path,
    destination: str | Path,
    *,
    quant: str | None = None,
    imatrix: str | Path | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Write the folder ``source`` as the GGUF file ``destination``.

    ``quant`` names one of llama.cpp's recipes (``Q4_K_M``, ``recipes.RECIPES``): then ggml itself
    encodes every matrix, by the importance matrix in the file ``imatrix`` where one is given.
    ``progress(done, total)`` counts bytes of the source.

    Raises ``DestinationExists`` without ``force``, ``InvalidRequest`` for a quant that is not known
    or does not fit, ``BackendUnavailable`` for one without llama.cpp's binding,
    ``UnsupportedModel`` for a family that has no way to GGUF yet, ``OutOfMemory`` where the disk is
    too small, and what opening ``source`` raises. Whatever it raises, the name ``destination`` is
    as it was.
    """
    started = time.perf_counter()
    target, folder = Path(destination), Path(source)
    if imatrix is not None and quant is None:
        raise InvalidRequest("an importance matrix goes with a quant")
    made = None if quant is None else recipe(quant)
    _check_paths(folder, target, force=force)
    importance = None if imatrix is None else read_imatrix(Path(imatrix))
    with closing(FolderWeights(folder)) as weights:
        work = _Export(weights, target, made, importance, progress)
        with new_file(target) as part:
            reports = work.run(part)
    return ExportReport(
        source=str(folder),
        destination=str(target),
        quant=made.name if made else None,
        tensors=reports,
        file_bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
        notes=work.notes,
    )


def _check_paths(folder: Path, target: Path, *, force: bool) -> None:
    if folder.is_file():
        raise InvalidRequest(f"{folder} is a file; export takes a Hugging Face or MLX folder")
    if target.is_dir():
        raise DestinationExists(f"{target} is a folder; give the name of a file")
    if os.path.lexists(target) and not force:
        raise DestinationExists(f"{target} exists; choose another name or use --force")
    if target.resolve().parent == folder.resolve() and target.name.endswith(".safetensors"):
        raise InvalidRequest(f"{target} would take the place of the source; choose another name")


@dataclass(frozen=True)
class _Plan:
    """One tensor: where it is read, what it becomes, and how its rows are moved."""

    source: Source
    spec: TensorSpec
    change: Change | None = None
    encoded: bool = False
    """By ggml, from its values."""
    slice: int = _SLICE

    @property
    def step(self) -> int:
        """Rows that are worked on at a time: whole runs where some are moved in these."""
        rows = max(1, self.slice // max(self.source.columns, 1))
        each = 1
        if self.change is not None:  # in rows of the source, which a kernel has more of
            each = self.change.unit * max(1, self.spec.shape[-1] // max(self.source.columns, 1))
        return max(each, rows // each * each)


class _Export:
    """One run: what is read, and what is made of it."""

    def __init__(
        self,
        weights: FolderWeights,
        target: Path,
        made: Recipe | None,
        importance: Importance | None,
        progress: OnProgress | None,
    ) -> None:
        self._weights = weights
        self._target = target
        self._made = made
        self._importance = importance
        self._progress = progress or (lambda _done, _total: None)
        self._config = exported_config(weights.config)
        self._family: str = self._config["model_type"]
        self._fields = fields(self._config)
        self._rope = rope_tensors(self._config)
        self._recorded = _recorded(weights.path)
        self._tokenizer, notes = describe(weights.path, self._config["vocab_size"])
        self._plans = self._quantized([self._plan(name) for name in weights.names()])
        self.notes = self._notes() + notes

    def run(self, part: Path) -> tuple[TensorReport, ...]:
        """Write the file; returns what became of each tensor."""
        rope = [TensorSpec(name, a.shape, T.F32) for name, a in self._rope.items()]
        head = header(self._metadata(), [*rope, *(plan.spec for plan in self._plans)])
        needed = _MARGIN + len(head) + sum(plan.spec.nbytes for plan in self._plans)
        check_disk(self._target, needed, self._target.parent)
        total, done = sum(plan.source.nbytes for plan in self._plans), 0
        reports = []
        with part.open("xb") as file, ThreadPoolExecutor(THREADS, "export") as pool:
            file.write(head)
            for array in self._rope.values():
                file.write(array.astype("<f4").tobytes())
                pad(file)
            for plan in self._plans:
                reports.append(self._write(file, pool, plan))
                done += plan.source.nbytes
                self._progress(done, total)
        return tuple(reports)

    def _plan(self, name: str) -> _Plan:
        part = source(self._weights, name)
        target = gguf_name(self._family, name)
        done = change(self._config, name)
        shape = part.shape if done is None or done.shape is None else done.shape
        return _Plan(part, TensorSpec(target, shape, self._type(part, target, shape)), done)

    def _type(self, part: Source, target: str, shape: tuple[int, ...]) -> GGMLType:
        """The type of a tensor that is not quantized on the way."""
        recorded = self._recorded.get(part.name)
        packing = self._weights.packing(part.name)
        if packing is None:
            dtype = self._weights.dtype(part.name)
            assert dtype is not None
            if recorded == DENSE[dtype]:
                return recorded
            return T.F32 if len(shape) < 2 or _ALWAYS_F32.fullmatch(target) else DENSE[dtype]
        bits, _, mode = packing
        if mode != "affine":
            fitting = {"mxfp4": T.MXFP4, "nvfp4": T.NVFP4}.get(mode, T.BF16)
            return fitting if part.columns % fitting.block_size == 0 else T.F16
        found = surveys(piece for piece in self._pieces(part) if isinstance(piece, Packed))
        able = [kind for kind in EXACT if holds(kind, found, bits, part.columns)]
        if recorded in able and found.fits:
            return recorded
        return able[0] if able else (T.F16 if found.peak <= _HALF_MAX else T.F32)

    def _pieces(self, part: Source) -> Iterator[Any]:
        step = max(1, _SLICE // max(part.columns, 1))
        for start in range(0, part.rows, step):
            yield part.read(start, min(start + step, part.rows))
        self._weights.release()

    def _quantized(self, plans: list[_Plan]) -> list[_Plan]:
        """The plans with the types of the recipe."""
        if self._made is None:
            return plans
        specs = [(plan.spec.name, plan.spec.shape) for plan in plans]
        types = tensor_types(self._made, specs, self._facts())
        found = []
        for plan in plans:
            kind = types.get(plan.spec.name, plan.spec.type)
            if kind.block_size > 1:
                self._check_importance(plan, kind)
            encoded = plan.spec.name in types and kind.block_size > 1
            found.append(replace(plan, spec=replace(plan.spec, type=kind), encoded=encoded))
        return found

    def _facts(self) -> ModelFacts:
        config = self._config
        return ModelFacts(
            architecture(self._family),
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config.get("num_key_value_heads") or config["num_attention_heads"],
            int(str(self._fields.get("expert_count", 0))),
            self._importance is not None,
        )

    def _check_importance(self, plan: _Plan, kind: GGMLType) -> None:
        """Raise ``InvalidRequest`` where the importance of a tensor is missing or another's."""
        assert self._made is not None
        name, shape = plan.spec.name, plan.spec.shape
        found = (self._importance or {}).get(name)
        if found is None:
            if needs_importance(name, kind, self._made):
                raise InvalidRequest(
                    f"{self._made.name} makes {name!r} {kind.name}, which needs an importance "
                    "matrix that has it; give one (--imatrix), or take a larger quant"
                )
            return
        if found.size != shape[-1] * math.prod(shape[:-2]) and name != "token_embd.weight":
            raise InvalidRequest(
                f"the importance matrix has {found.size} values for {name!r} of shape "
                f"{list(shape)}; it is another model's"
            )

    def _notes(self) -> tuple[str, ...]:
        if self._made is None or not any(plan.source.packed for plan in self._plans):
            return ()
        return ("the source is quantized already: its losses and those of this add up",)

    def _metadata(self) -> dict[str, MetadataValue]:
        arch = architecture(self._family)
        weights: dict[GGMLType, int] = {}
        for plan in self._plans:
            weights[plan.spec.type] = weights.get(plan.spec.type, 0) + plan.source.weights
        usual = max(weights, key=lambda kind: weights[kind])
        found: dict[str, MetadataValue] = {
            "general.architecture": arch,
            "general.type": "model",
            "general.name": self._weights.path.resolve().name,
            "general.file_type": self._made.number if self._made else _FILE_TYPES[usual],
            "general.quantization_version": 2,
        }
        if self._importance is not None:
            found["quantize.imatrix.entries_count"] = len(self._importance)
        found |= {f"{arch}.{key}": value for key, value in self._fields.items()}
        return found | self._tokenizer

    def _write(self, file: BinaryIO, pool: ThreadPoolExecutor, plan: _Plan) -> TensorReport:
        """Write a tensor, and say what it lost by its first rows."""
        rows, report = plan.source.rows, None
        each = rows if len(plan.spec.shape) < 3 else plan.spec.shape[-2]  # rows of an expert
        spans = [
            (start, min(start + plan.step, first + each))
            for first in range(0, rows, each)
            for start in range(first, first + each, plan.step)
        ]
        for at in range(0, len(spans), _BATCH):
            for raw in pool.map(lambda span: self._made_of(plan, *span), spans[at : at + _BATCH]):
                report = report or self._report(plan, raw)
                file.write(raw.data)
            self._weights.release()
        pad(file)
        assert report is not None
        return report

    def _made_of(self, plan: _Plan, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows as they will lie in the file."""
        piece = self._read(plan, start, stop)
        kind, name = plan.spec.type, plan.spec.name
        if not plan.encoded:
            raw = encode(piece, kind)
            if kind == T.F16 and not _is_finite(raw, piece):
                raise InvalidRequest(f"tensor {name!r} has numbers beyond float16; take BF16")
            return raw
        values = dequantize(piece)
        if not np.isfinite(values).all():
            raise FormatError(f"tensor {plan.source.name!r} has numbers that are not finite")
        try:
            return ggml.quantize(values, kind, self._importance_of(plan, start))
        except OverflowError as error:
            raise InvalidRequest(
                f"tensor {name!r} has numbers too large for {kind.name}; take BF16"
            ) from error

    def _importance_of(self, plan: _Plan, row: int) -> F32 | None:
        found = (self._importance or {}).get(plan.spec.name)
        columns = plan.spec.shape[-1]
        if found is None or found.size != columns * math.prod(plan.spec.shape[:-2]):
            return None
        expert = row // plan.spec.shape[-2]
        importance: F32 = found.reshape(-1, columns)[expert]
        return importance

    def _read(self, plan: _Plan, start: int, stop: int) -> Tensor:
        """Rows of the source in the order of the file."""
        piece = plan.source.read(start, stop)
        assert isinstance(piece, (Dense, Packed))
        if plan.change is None:
            return piece
        return changed_back(piece, plan.change, is_vector=len(plan.source.shape) == 1)

    def _report(self, plan: _Plan, raw: npt.NDArray[np.uint8]) -> TensorReport:
        rows = min(replace(plan, slice=SAMPLE).step, len(raw))
        values = dequantize(self._read(plan, 0, rows))
        return measured(plan.source, plan.spec, values, raw[:rows])


def _is_finite(raw: npt.NDArray[np.uint8], piece: Tensor) -> bool:
    """Whether float16 numbers are finite where those of the source are."""
    found = np.isfinite(raw.view(np.float16))
    return bool(found.all()) or not np.isfinite(dequantize(piece)[~found]).any()


def _recorded(folder: Path) -> dict[str, GGMLType]:
    """The types that tensors had in the GGUF file that rl-mlx made the folder of."""
    tensors = read_json(folder / "rl_mlx.json").get("tensors")
    found = {}
    for line in tensors if isinstance(tensors, list) else []:
        kind = line.get("source") if isinstance(line, dict) else None
        if isinstance(kind, str) and kind in GGMLType.__members__:
            found[str(line["name"])] = GGMLType[kind]
    return found
