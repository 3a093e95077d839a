"""A model reference becomes files on disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib.resources import files
from itertools import chain
from pathlib import Path

from rl_mlx.errors import InvalidRequest, ModelNotFound
from rl_mlx.store import hub, hubcache, llamacpp, lmstudio, ollama
from rl_mlx.store.models import InstalledModel, ModelFiles, first_part, pick, stem, variants

DEMO = "demo"


def resolve(reference: str) -> ModelFiles:
    """Files of ``reference``; a hub model that is on no disk here is downloaded.

    A reference is ``demo``, a path, ``ollama:NAME``, a hub reference (``hub.HubRef``) or a name
    that ``installed`` gives; the first of these that fits is taken. Raises ``ModelNotFound`` with
    the nearest names, ``InvalidRequest`` for a malformed one, and what ``hub.download`` raises.
    """
    found = find(reference)
    return hub.download(found) if isinstance(found, hub.HubRef) else found


def find(reference: str) -> ModelFiles | hub.HubRef:
    """As ``resolve``, but what would have to be downloaded is given back as the hub's reference."""
    if not reference.strip():
        raise InvalidRequest("the model's name is empty; rl-mlx list shows those on this machine")
    if reference == DEMO:
        if not _demo().is_file():
            raise ModelNotFound("the demo model is not in this installation; reinstall rl-mlx")
        return ModelFiles(DEMO, _demo())
    path = _path(reference)
    if path is not None and path.exists():
        return _local(path)
    if _is_path(reference):
        raise ModelNotFound(_no_path(reference, path))
    if reference.startswith(ollama.PREFIX):
        return _in_ollama(reference.removeprefix(ollama.PREFIX))
    ref = hub.HubRef.parse(reference)
    model = _by_name(reference) if ref is None else _of_repo(ref)
    if model is not None:
        return ModelFiles(model.name, model.path)
    if ref is None:
        raise ModelNotFound(
            f"no model {reference!r} here{_near(reference)}; rl-mlx list shows what there is, "
            "rl-mlx pull org/repo gets one from Hugging Face (GGUF: org/repo:Q4_K_M)"
        )
    return ref


def installed() -> Iterator[InstalledModel]:
    """Every model on this machine that a reference finds, built-in first, each name once."""
    names = set()
    stores = (hubcache, ollama, lmstudio, llamacpp)
    for model in chain(_built_in(), *(store.installed() for store in stores)):
        if model.name not in names:
            names.add(model.name)
            yield model


def _demo() -> Path:
    return Path(str(files("rl_mlx.demo") / "demo.gguf"))


def _built_in() -> Iterator[InstalledModel]:
    if (path := _demo()).is_file():
        yield InstalledModel(DEMO, path, "built in", path.stat().st_size)


def _path(reference: str) -> Path | None:
    try:
        path = Path(reference).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, ~nobody, a NUL
        return None
    return path


def _is_path(reference: str) -> bool:
    if reference.startswith((".", "/", "~")) or "\\" in reference or "\0" in reference:
        return True
    is_file = reference.lower().endswith((".gguf", ".safetensors", "/"))
    return is_file and ":" not in reference and not hub.is_address(reference)


def _no_path(reference: str, path: Path | None) -> str:
    if path is not None and path.is_symlink():
        return f"{reference} is a link to a file that is gone: {path.readlink()}"
    return f"no file or folder {reference!r}{_near(reference)}"


def _local(path: Path) -> ModelFiles:
    if path.is_file():
        first = first_part(path)
        if not first.exists():
            raise ModelNotFound(
                f"{path.name} is one part of a model whose first, {first.name}, is missing"
            )
        if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
            return _local(path.resolve().parent if path.parent == Path() else path.parent)
        return ModelFiles(stem(first), first)
    if not path.is_dir():
        raise ModelNotFound(f"{path} is neither a file nor a folder")
    if (path / "config.json").is_file():
        return ModelFiles(path.resolve().name, path)
    found = variants(entry.name for entry in path.iterdir() if entry.is_file())
    if not found:
        raise ModelNotFound(f"the folder {path} holds neither a config.json nor GGUF files")
    if len(found) > 1:
        there = ", ".join(v.files[0] for v in found)
        raise ModelNotFound(f"the folder {path} holds more than one model; name a file: {there}")
    return _local(path / found[0].files[0])


def _in_ollama(name: str) -> ModelFiles:
    model = ollama.find(name)
    if model is None:
        raise ModelNotFound(
            f"Ollama has no {name} here{_near(name)}; get it by: ollama pull {name}"
        )
    return ModelFiles(model.name, model.path)


def _by_name(name: str) -> InstalledModel | None:
    """By the name ``installed`` gives, or by Ollama's own without the prefix."""
    named = (m for m in installed() if m.name in (name, f"{ollama.PREFIX}{name}"))
    first = next(named, None)
    return first or (ollama.find(name) if ollama.is_name(name) else None)


def _of_repo(ref: hub.HubRef) -> InstalledModel | None:
    """A model of that repository in any store; None where it has none that the tag names."""
    found = list(hubcache.installed(ref.repo, ref.revision))
    if ref.revision == "main":
        found += [*lmstudio.installed(ref.repo), *llamacpp.installed(ref.repo)]
        if ref.tag and not found and (model := ollama.find(f"hf.co/{ref.repo}:{ref.tag}")):
            return model
    if ref.tag is None:
        folder = next((m for m in found if ":" not in m.name), None)
        if folder is not None or len(found) <= 1:
            return folder or next(iter(found), None)
    files_here = {m.path.name: m for m in found if ":" in m.name}
    try:
        chosen = pick(variants(files_here), ref.tag, ref.repo)
    except ModelNotFound:
        return None
    return files_here.get(chosen.files[0])


def _near(name: str) -> str:
    """``; did you mean ...`` with the installed models whose names come close, else nothing."""
    models = {m.name.removeprefix(ollama.PREFIX).casefold(): m.name for m in installed()}
    models |= {key.rpartition("/")[2]: full for key, full in models.items()}
    wanted = name.removeprefix(ollama.PREFIX).casefold()
    close = difflib.get_close_matches(wanted, models, n=3, cutoff=0.5)
    close += [key for key in models if wanted in key]
    names = list(dict.fromkeys(models[key] for key in close))[:3]
    return f"; did you mean {' or '.join(names)}?" if names else ""
