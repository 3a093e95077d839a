"""``convert``: a GGUF file or a folder becomes an MLX folder, a slice of a tensor at a time.

First every tensor is sampled and its container chosen, so that the size is known before a byte is
written; then the tensors are read, held and written in one pass.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from rl_mlx import __version__
from rl_mlx.convert import fidelity as rules
from rl_mlx.convert import layout
from rl_mlx.convert.checkpoint import (
    SHARD_BYTES,
    ShardWriter,
    mlx_config,
    write_json,
)
from rl_mlx.convert.chunks import THREADS
from rl_mlx.convert.digest import digest
from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.fidelity import Choice, Fidelity, Loss, measure
from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.rope import FREQS
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.pieces import Holding, Source, Unfit, hold, source
from rl_mlx.convert.recipe import Recipe
from rl_mlx.convert.report import Report, tensor_report, totals
from rl_mlx.convert.staging import check_disk, new_folder
from rl_mlx.convert.tokenizer import tokenizer_files
from rl_mlx.convert.weights import FloatType
from rl_mlx.errors import FormatError, InvalidRequest, UnsupportedModel

OnProgress = Callable[[int, int], None]
# Weights that a thread works on at a time: packed ones, and floats, stay in its cache.
_SLICE, _FLOAT_SLICE = 1 << 20, 1 << 18
_ROUND = 32  # slices after which the pages that were read are given back, and progress is told
_MARGIN = 64 << 20  # bytes for tokenizer, headers and the file system's own
# Files of a folder that are copied, besides the weights: tokenizer, templates, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_FLOATS: Mapping[str, FloatType] = MappingProxyType({"F16": "float16", "BF16": "bfloat16"})
_OWN = {"config.json", "model.safetensors.index.json", "rl_mlx.json"}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    quant: str | Recipe | None = None,
    group_size: int | None = None,
    fidelity: Fidelity = "faithful",
    scales: FloatType = "float16",
    dtype: FloatType | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: OnProgress | None = None,
) -> Report:
    """Write the model ``source`` (a GGUF file, a Hugging Face or MLX folder) as an MLX folder.

    Blocks of a GGUF file are moved into MLX's containers by the rule ``fidelity``: ``exact``
    changes no value, ``faithful`` adds at most 10% of the type's own noise power to a tensor,
    ``compact`` lets none grow by more than 5%. ``scales`` is the float type of packed tensors'
    scales, and of plain floats beside them where none is changed by it; ``dtype`` rounds all plain
    floats to it. ``quant`` (``q4``, ``mxfp4``... or a ``Recipe``) quantizes every matrix that takes
    more room, in groups of ``group_size``. ``progress(done, total)`` counts bytes of the source.

    Raises ``DestinationExists`` without ``force``, ``OutOfMemory`` where the disk is too small,
    ``InvalidRequest`` for unknown options, ``UnsupportedModel``, and what opening ``source``
    raises. Whatever it raises, nothing is left under the name ``destination``.
    """
    started = time.perf_counter()
    options = _Options(_recipe(quant, group_size), fidelity, scales, dtype)
    destination = Path(destination)
    with closing(open_weights(source)) as weights:
        assert isinstance(weights, (GGUFWeights, FolderWeights))
        _check_paths(weights.path, destination)
        with (
            new_folder(destination, force=force) as folder,
            ThreadPoolExecutor(THREADS, "convert") as pool,
        ):
            work = _Conversion(weights, options, folder, destination, pool, progress)
            return work.run(shard_bytes, started)


@dataclass(frozen=True)
class _Options:
    recipe: Recipe | None
    fidelity: Fidelity
    scales: FloatType
    dtype: FloatType | None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("fidelity", self.fidelity, get_args(Fidelity)),
            ("scales", self.scales, get_args(FloatType)),
            ("dtype", self.dtype, (None, *get_args(FloatType))),
        ):
            if value not in known:
                words = ", ".join(k for k in known if k)
                raise InvalidRequest(f"no {name} {value!r}; known are {words}")


def _recipe(quant: str | Recipe | None, group_size: int | None) -> Recipe | None:
    if isinstance(quant, str):
        return Recipe(quant=quant, group_size=group_size)
    if group_size is not None:
        raise InvalidRequest("group_size goes with the name of a quant")
    return quant


def _check_paths(source: Path, destination: Path) -> None:
    here, there = source.resolve(), destination.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise InvalidRequest(f"{destination} lies in the way of the source; choose another place")


_Held = tuple[Source, Holding, Loss]


class _Conversion:
    """One run: what is read, how, and where to."""

    def __init__(
        self,
        weights: GGUFWeights | FolderWeights,
        options: _Options,
        folder: Path,
        destination: Path,
        pool: Executor,
        progress: OnProgress | None,
    ) -> None:
        self._weights = weights
        self._options = options
        self._folder = folder
        self._destination = destination
        self._pool = pool
        self._progress = progress or (lambda _done, _total: None)
        self._sources = [source(weights, name) for name in weights.names()]
        self._main = self._main_type()
        family = FAMILIES.get(str(weights.config.get("model_type")))
        self._plain = tuple(f".{module}.weight" for module in family.plain) if family else ()
        self._done = 0
        self._total = sum(part.nbytes for part in self._sources)

    def run(self, shard_bytes: int, started: float) -> Report:
        self._check_family()
        notes = self._write_texts()
        digested = self._pool.submit(digest, self._weights.files)
        choices = list(self._pool.map(self._choose, self._sources))
        needed = _MARGIN + sum(map(_room, self._sources, choices))
        check_disk(self._destination, needed, self._destination.parent)
        held = self._write_weights(choices, shard_bytes)
        config = mlx_config(
            self._weights.config, {s.name: (holding, s.weights) for s, holding, _ in held}
        )
        write_json(self._folder / "config.json", config)
        notes += _notes(config, [holding for _, holding, _ in held])
        report = self._report(held, digested.result(), notes, time.perf_counter() - started)
        write_json(self._folder / "rl_mlx.json", {"rl_mlx": __version__} | report.as_dict())
        return report

    def _write_weights(self, choices: list[Choice], shard_bytes: int) -> list[_Held]:
        shards = ShardWriter(self._folder, [s.name for s in self._sources], shard_bytes)
        try:
            held = [
                (part, *self._write(shards, part, choice))
                for part, choice in zip(self._sources, choices, strict=True)
            ]
            shards.finish(sum(s.weights for s in self._sources))
        finally:
            shards.abandon()
        return held

    def _report(
        self, held: list[_Held], sha256: str, notes: tuple[str, ...], seconds: float
    ) -> Report:
        options = self._options
        rms, peak, ratio = totals([(part.weights, loss) for part, _, loss in held])
        return Report(
            source=str(self._weights.path),
            destination=str(self._destination),
            sha256=sha256,
            fidelity=options.fidelity,
            scales=options.scales,
            quant=options.recipe.quant if options.recipe else None,
            tensors=tuple(tensor_report(*line) for line in held),
            rms=rms,
            max_error=peak,
            noise_ratio=ratio,
            seconds=seconds,
            notes=notes,
        )

    def _check_family(self) -> None:
        config, path = self._weights.config, self._weights.path
        if FREQS in self._weights.names():
            raise UnsupportedModel(
                f"{path}: its rotary frequencies are scaled in a way that no MLX folder can say"
            )
        if self._options.recipe is not None and not layout.knows(config):
            raise UnsupportedModel(
                f"{path}: {config.get('model_type')!r} is not a family that is quantized here; "
                "use mlx_lm.convert -q"
            )

    def _main_type(self) -> FloatType:
        """What plain floats become where that changes none of them: the type of most weights."""
        if any(s.packed for s in self._sources):
            return self._options.scales
        counts: Counter[str] = Counter()
        for part in self._sources:
            counts[part.kind] += part.weights
        return _FLOATS.get(counts.most_common(1)[0][0], "float32")

    def _choose(self, part: Source) -> Choice:
        choice = self._rule(part)
        self._weights.release()
        return choice

    def _rule(self, part: Source) -> Choice:
        """The containers for a tensor, by what was asked for."""
        options = self._options
        wanted = None
        if options.recipe is not None and not part.name.endswith(self._plain):
            wanted = options.recipe.holding(part.name, part.shape, options.scales)
        if wanted and (not part.packed or wanted.nbytes(part.weights) < part.nbytes):
            return rules.requantized(part, wanted)
        if part.packed:
            if isinstance(self._weights, FolderWeights):
                return rules.unchanged(part)
            return rules.choose(part, options.fidelity, options.scales)
        if options.dtype is not None:
            return rules.rounded(part, options.dtype, lossless=False)
        if options.recipe is not None:
            return rules.rounded(part, options.scales, lossless=False)
        if isinstance(self._weights, FolderWeights):
            return rules.unchanged(part)
        return rules.rounded(part, self._main, lossless=True)

    def _write(self, shards: ShardWriter, part: Source, choice: Choice) -> tuple[Holding, Loss]:
        """Write a tensor in the first container that fits it, and say which that is."""
        for i, holding in enumerate(choice.holdings):
            shards.begin(part.name, part.shape, holding)
            try:
                self._stream(shards, part, holding)
            except Unfit:
                continue
            self._done += part.nbytes
            return holding, choice.loss if i == 0 else measure(part, holding)
        raise FormatError(
            f"{self._weights.path}: tensor {part.name!r} holds numbers that no MLX container holds"
        )

    def _stream(self, shards: ShardWriter, part: Source, holding: Holding) -> None:
        """Slices of a tensor, each read, held and written by one thread, in its cache."""
        step = max(1, (_SLICE if part.packed else _FLOAT_SLICE) // max(part.columns, 1))

        def share(waiting: Iterator[int]) -> None:
            for start in waiting:  # whoever is free takes the next one
                stop = min(start + step, part.rows)
                shards.write(hold(part.read(start, stop), holding), start, part.rows)

        starts = range(0, part.rows, step)
        for first in range(0, len(starts), _ROUND):
            waiting = iter(starts[first : first + _ROUND])
            helpers = min(THREADS, len(starts) - first) - 1
            shares = [self._pool.submit(share, waiting) for _ in range(helpers)]
            try:
                share(waiting)
            finally:  # nobody writes any more when this one's place is given away
                deque(waiting, maxlen=0)
                wait(shares)
            for each in shares:
                each.result()
            self._weights.release()
            done = min(part.rows, (first + _ROUND) * step)
            self._tell(part.nbytes * done // part.rows)

    def _tell(self, of_this: int) -> None:
        self._progress(self._done + of_this, self._total)

    def _write_texts(self) -> tuple[str, ...]:
        """Tokenizer, templates and the like; returns what should be known about them."""
        if isinstance(self._weights, FolderWeights):
            _copy_texts(self._weights.path, self._folder)
            return ()
        with GGUFFile.open(self._weights.path) as file:
            files = tokenizer_files(file, self._weights.config.get("max_position_embeddings"))
        for name, text in files.items():
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        return () if files else ("the GGUF file has no tokenizer, and so the folder has none",)


def _room(part: Source, choice: Choice) -> int:
    """Bytes to keep free for a tensor; one that must be lossless may have to be another."""
    holdings = choice.holdings if choice.holdings[0].lossless else choice.holdings[:1]
    return max(holding.nbytes(part.weights) for holding in holdings)


def _copy_texts(source: Path, folder: Path) -> None:
    """Tokenizer, templates and licence of a folder, links followed."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name not in _OWN and path.is_file():
                shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _notes(config: Mapping[str, Any], holdings: list[Holding]) -> tuple[str, ...]:
    """What people should know who run the folder elsewhere."""
    notes = []
    main = config["dtype"]
    kinds = sorted({holding.dtype for holding in holdings if holding.mode == "affine"})
    if len(kinds) > 1:
        narrow = main if main != "float32" else kinds[0]
        notes.append(
            f"some tensors are {' and some '.join(kinds)}: mlx-lm computes in float32 with such a "
            f"mixture, which is slower; dtype={narrow!r} rounds plain floats to one type"
        )
    if main == "float16" and str(config.get("model_type")).startswith("gemma"):
        notes.append("Gemma overflows float16 in mlx-lm; scales='bfloat16' is safe there")
    return tuple(notes)
