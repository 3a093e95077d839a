"""Hugging Face references and downloads: only the files a model needs, into Hugging Face's own
cache.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from rl_mlx.convert.files import is_weights
from rl_mlx.convert.staging import check_disk
from rl_mlx.errors import InvalidRequest, ModelNotFound, OutOfMemory, RlMlxError
from rl_mlx.store import places
from rl_mlx.store.models import TOKENIZERS, ModelFiles, pick, variants

HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
# What a folder's tokenizer, template and config may consist of, besides the weights themselves.
_SMALL = {
    *TOKENIZERS, "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "rl_mlx.json",
}  # fmt: skip


@dataclass(frozen=True)
class HubRef:
    """``org/repo``, perhaps a ``tag`` (a quantization or a GGUF file's name), at a ``revision``."""

    repo: str
    tag: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo

    @classmethod
    def parse(cls, reference: str) -> HubRef | None:
        """A reference to the hub, or None for what cannot be one.

        ``org/repo``, ``org/repo:Q4_K_M``, ``org/repo@revision``, ``hf.co/org/repo:Q4_K_M`` and the
        address of a repository's or a file's page. Raises ``InvalidRequest`` for an address that is
        none of a model.
        """
        if is_address(reference):
            return _from_address(reference)
        if "://" in reference:
            raise InvalidRequest(f"{reference!r}: only addresses of huggingface.co are understood")
        name, _, tag = reference.partition(":")
        repo, _, revision = name.partition("@")
        if not _REPO.fullmatch(repo) or ".." in repo:
            return None
        if ":" in reference and not _is_name(_TAG, tag):
            raise InvalidRequest(f"{tag!r} in {reference!r} is no quantization, such as Q4_K_M")
        if "@" in name and not _is_name(_REVISION, revision):
            raise InvalidRequest(f"{revision!r} in {reference!r} is no branch, tag or commit")
        return cls(repo, tag or None, revision or "main")


def is_address(reference: str) -> bool:
    """True for what starts with one of the hub's host names."""
    host = re.match(r"(?:https?://)?([^/]+)/", reference)
    return host is not None and host[1].lower() in HOSTS


def _is_name(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None and ".." not in text


def _from_address(reference: str) -> HubRef:
    text = reference if "://" in reference else f"https://{reference}"
    parts = [unquote(p) for p in urlsplit(text).path.split("/") if p]
    ref = HubRef.parse("/".join(parts[:2]))
    if ref is None or parts[0] in {"datasets", "spaces"}:
        raise InvalidRequest(f"{reference!r} is not the address of a model; use org/repo:Q4_K_M")
    if len(parts) == 2:
        return ref
    if parts[2] not in {"resolve", "blob", "tree"} or len(parts) < 4:
        raise InvalidRequest(f"{reference!r} is not a model's page or file; use {ref.repo}")
    tag = parts[-1] if len(parts) > 4 and parts[-1].lower().endswith(".gguf") else ref.tag
    if not _is_name(_REVISION, parts[3]) or (tag and not _is_name(_TAG, tag)):
        raise InvalidRequest(f"{reference!r} is not a model's page or file; use {ref.repo}")
    return HubRef(ref.repo, tag, parts[3])


def choose(files: Iterable[str], ref: HubRef) -> tuple[str, list[str]]:
    """The name of the model that ``ref`` asks for, and which of a repository's ``files`` it needs.

    Raises ``ModelNotFound`` that lists what there is.
    """
    files = sorted(files)
    gguf = variants(files)
    weights = [file for file in files if is_weights(file)]
    if weights and ref.tag is None and "config.json" in files:
        return ref.repo, [*weights, *(file for file in files if file in _SMALL)]
    if not gguf:
        raise ModelNotFound(f"{ref.repo} holds neither GGUF nor safetensors files of a model")
    chosen = pick(gguf, ref.tag, ref.repo)
    if not chosen.complete:
        raise ModelNotFound(f"{ref.repo} lacks parts of {chosen.tag}; it has {len(chosen.files)}")
    return f"{ref.repo}:{chosen.tag}", list(chosen.files)


def download(ref: HubRef, bar: type[Any] | None = None) -> ModelFiles:
    """Fetch what is not here yet of a model, with progress on stderr, or told to ``bar``, a class
    like ``tqdm``; what that raises ends the download.

    Raises ``ModelNotFound``, ``OutOfMemory`` where the disk is too small, ``RlMlxError`` for a
    network that fails.
    """
    # The hub's client costs 0.2 s, so it is imported only where it is used.
    from huggingface_hub import HfApi  # noqa: PLC0415

    cache = places.hub_cache()
    with explained(ref):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="rl-mlx")
        info = api.model_info(ref.repo, revision=ref.revision, files_metadata=True)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
        name, files = choose(sizes, ref)
        here = cache / f"models--{ref.repo.replace('/', '--')}" / "snapshots" / str(info.sha)
        needed = sum(sizes[f] for f in files if not (here / f).exists())
        advice = "make room (rl-mlx rm), or set HF_HUB_CACHE to a folder elsewhere"
        check_disk(ref, needed, cache, advice)
        # One after the other in this thread (each is fetched in parallel pieces): the pool that
        # snapshot_download has would not let go at Ctrl-C. The branch is noted when all is here.
        for file in files:
            api.hf_hub_download(ref.repo, file, revision=info.sha, cache_dir=cache, tqdm_class=bar)
        first = api.hf_hub_download(ref.repo, files[0], revision=ref.revision, cache_dir=cache)
    is_gguf = files[0].lower().endswith(".gguf")
    return ModelFiles(name, Path(first) if is_gguf else Path(first).parent)


@contextmanager
def explained(ref: HubRef) -> Iterator[None]:
    """What the hub's client raises within, as errors of ours that say what to do."""
    from huggingface_hub import errors  # noqa: PLC0415 - as above

    # httpx's in one release of the hub's client, another package's in the next
    network_error = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except (network_error, OSError, errors.HFValidationError) as error:
        raise _explain(error, ref, places.hub_cache()) from error


def _explain(error: Exception, ref: HubRef, cache: Path) -> RlMlxError:
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, RlMlxError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"{ref.repo} is gated: accept its terms at https://huggingface.co/{ref.repo}, "
            "then log in by: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{ref.repo} has no branch, tag or commit {ref.revision!r}")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return ModelNotFound(
            f"huggingface.co has no model {ref.repo}, or it is private (log in by: hf auth login)"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelNotFound(
            f"{ref} is not on this machine, and HF_HUB_OFFLINE forbids fetching it"
        )
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return OutOfMemory(f"the disk of {cache} is full; make room and run this again")
    if isinstance(error, PermissionError):
        return RlMlxError(f"cannot write to {cache}: set HF_HUB_CACHE to a folder that is yours")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RlMlxError(
        f"fetching {ref} failed ({first}); check the network and run this again; "
        "the files that came whole are kept"
    )
