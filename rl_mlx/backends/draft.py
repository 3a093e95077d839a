"""What ``draft=`` means for the MLX backend: the text, a smaller model, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl_mlx.convert.open import open_weights
from rl_mlx.convert.weights import FloatType, Weights
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.speculate import Both, DraftModel, Lookup, Proposer
from rl_mlx.errors import InvalidRequest
from rl_mlx.model.load import load_decoder
from rl_mlx.store import ModelFiles, resolve
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import ModelInfo

_LOOKUP = "lookup"


@dataclass(frozen=True)
class FoundDraft:
    """A draft that was found and checked, and not loaded yet. ``weights`` are None for a lookup."""

    weights: Weights | None
    looks_up: bool
    weight_bytes: int
    parameters: int

    def load(self, target: ModelInfo, runner: Runner, *, unpack: bool) -> Proposer:
        """The proposer, whose memory ``runner`` counts; to be called on the engine's thread."""
        if self.weights is None:
            return Lookup()
        dtype: FloatType = target.dtype  # type: ignore[assignment]
        decoder = load_decoder(self.weights, target.context, dtype, unpack=unpack)
        model = DraftModel(decoder, target.vocab)
        self.weights.close()
        runner.beside = model.bytes_for
        return Both(Lookup(), model) if self.looks_up else model

    def notes(self, target: ModelInfo) -> tuple[str, ...]:
        """What the user should know."""
        if self.weight_bytes > target.weight_bytes:
            return ("the draft model is larger than the model: drafting will hardly pay",)
        return ()


def find_draft(files: ModelFiles, reference: str | None) -> FoundDraft | None:
    """The draft that ``reference`` names for the model of ``files``: see ``ModelSettings.draft``.

    Raises ``ModelNotFound``, and ``InvalidRequest`` for a model of another vocabulary.
    """
    if reference is None:
        return None
    shipped = files.path.with_name("draft.gguf")  # the demo model has its draft beside it
    if reference == "auto":
        reference = str(shipped) if files.name == "demo" and shipped.exists() else _LOOKUP
    if reference == _LOOKUP:
        return FoundDraft(weights=None, looks_up=True, weight_bytes=0, parameters=0)
    name = reference.removeprefix(f"{_LOOKUP}+")
    draft = resolve(name)
    ours, theirs = Tokenizer.open(files.path), Tokenizer.open(draft.path)
    if ours.fingerprint != theirs.fingerprint:
        raise InvalidRequest(
            f"draft {name!r} has another vocabulary than {files.name} ({theirs.vocab_size} and "
            f"{ours.vocab_size} tokens, not the same ones); take a smaller model of the same family"
        )
    weights = open_weights(draft.path)
    return FoundDraft(
        weights=weights,
        looks_up=name != reference,
        weight_bytes=sum(weights.nbytes(tensor) for tensor in weights.names()),
        parameters=sum(math.prod(weights.shape(tensor)) for tensor in weights.names()),
    )
