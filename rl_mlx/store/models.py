"""What a store answers with, and which files of a folder make one model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from rl_mlx.convert.files import is_weights, read_json
from rl_mlx.errors import ModelNotFound

PREFERRED = (
    "Q4_K_M"  # what a GGUF repository gives when no quantization is named, as llama.cpp does
)

_GGUF = re.compile(r"(?P<stem>.+?)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.gguf", re.IGNORECASE)
_SHARD = re.compile(r".+-\d{5}-of-(?P<parts>\d{5})\.safetensors")
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q[1-8]_[A-Z0-9]+(?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4"
    r"|BF16|FP?16|FP?32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


@dataclass(frozen=True)
class ModelFiles:
    """``path`` is a GGUF file (a split one's first) or a folder; ``name`` is what to call it."""

    name: str
    path: Path


@dataclass(frozen=True)
class InstalledModel:
    """A model on this machine. ``source`` says whose store holds it; ``bytes`` are those of its
    weights.
    """

    name: str
    path: Path
    source: str
    bytes: int


@dataclass(frozen=True)
class Variant:
    """One GGUF model among others in a folder: its parts in order, ``complete`` when none is
    missing.

    ``tag`` is the quantization its name tells (``Q4_K_M``), else the name without ``.gguf``.
    """

    tag: str
    stem: str
    files: tuple[str, ...]
    complete: bool


def variants(names: Iterable[str]) -> list[Variant]:
    """The GGUF models among ``names`` (paths with ``/``), split parts put together, sorted by name.

    Projectors (mmproj) and importance matrices are no models; names that leave the folder are
    dropped.
    """
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        match = _GGUF.fullmatch(name)
        path = PurePosixPath(name)
        if match is None or path.is_absolute() or ".." in path.parts or _NOT_MODELS.search(name):
            continue
        key = (match["stem"], int(match["parts"] or 1))
        groups.setdefault(key, {})[int(match["part"] or 1)] = name
    found = [
        Variant(
            tag=_tag(stem),
            stem=PurePosixPath(stem).name,
            files=tuple(files[i] for i in sorted(files)),
            complete=sorted(files) == list(range(1, parts + 1)),
        )
        for (stem, parts), files in sorted(groups.items())
    ]
    tags = [v.tag for v in found]
    return [v if tags.count(v.tag) == 1 else replace(v, tag=v.stem) for v in found]


def siblings(path: Path) -> list[Variant]:
    """The quantizations of the same model beside a GGUF file, its own among them."""
    names = [p.name for p in path.parent.iterdir() if p.is_file()]
    same = [name for name in names if _model(Path(name)) == _model(path)]
    return [v for v in variants(same) if v.complete]


def _model(path: Path) -> str:
    """A GGUF file's name without its quantization."""
    name = stem(path)
    found: list[str] = _QUANT.findall(name)
    return name.replace(found[-1], "").casefold() if found else name.casefold()


def _tag(stem: str) -> str:
    name = PurePosixPath(stem).name
    quants = _QUANT.findall(name) or _QUANT.findall(stem)
    return quants[-1].upper() if quants else name


def first_part(path: Path) -> Path:
    """The first file of a split GGUF model, whichever of its parts ``path`` is."""
    match = _GGUF.fullmatch(path.name)
    if match is None or match["parts"] is None:
        return path
    return path.with_name(f"{match['stem']}-00001-of-{match['parts']}{path.suffix}")


def stem(path: Path) -> str:
    """A GGUF file's name without the suffix and the number of its part."""
    match = _GGUF.fullmatch(path.name)
    return match["stem"] if match else path.stem


def pick(found: list[Variant], tag: str | None, where: str) -> Variant:
    """The variant that ``tag`` names; with no tag the only one, or ``PREFERRED``.

    A tag is a quantization, or a file's name with or without ``.gguf``, in any case. Raises
    ``ModelNotFound`` that lists what there is.
    """
    if tag is None:
        matches = found if len(found) == 1 else [v for v in found if v.tag == PREFERRED]
    else:
        file = _GGUF.fullmatch(tag)
        wanted = (file["stem"] if file else tag).casefold()
        matches = [v for v in found if wanted in (v.tag.casefold(), v.stem.casefold())]
        matches = matches or [v for v in found if _has_word(v.stem.casefold(), wanted)]
    if len(matches) == 1:
        return matches[0]
    problem = f"no {tag!r} in" if tag and not matches else "more than one model in"
    there = ", ".join(v.tag for v in (matches or found))
    raise ModelNotFound(f"{problem} {where}; name one of these after a colon: {there}")


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text) is not None


def models_in(folder: Path, name: str, source: str) -> Iterator[InstalledModel]:
    """The complete models in ``folder``: ``name`` for safetensors, ``name:TAG`` for each GGUF."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()  # false for a broken link, such as a download that was deleted
    }
    if generates(folder, sizes):
        weights = sum(n for file, n in sizes.items() if is_weights(file))
        yield InstalledModel(name, folder, source, weights)
    for variant in variants(sizes):
        if variant.complete:
            size = sum(sizes[file] for file in variant.files)
            yield InstalledModel(f"{name}:{variant.tag}", folder / variant.files[0], source, size)


def generates(folder: Path, files: Iterable[str]) -> bool:
    """True where ``files`` of ``folder`` are a whole language model in safetensors, and not an
    encoder.
    """
    files = set(files)
    if "config.json" not in files or not any(name in files for name in TOKENIZERS):
        return False
    shards = {file for file in files if is_weights(file)}
    index = read_json(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):
        whole = bool(index) and set(index.values()) <= shards
    else:
        parts = [_SHARD.fullmatch(file) for file in shards]
        whole = bool(shards) and all(m is None or int(m["parts"]) <= len(shards) for m in parts)
    architectures = read_json(folder / "config.json").get("architectures") or []
    return whole and (not architectures or any(str(a).endswith(_GENERATES) for a in architectures))


def folders(path: Path) -> list[Path]:
    """The folders in ``path``, sorted; none where it cannot be read."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError:
        return []
