"""Texts that models are measured on, and how they are cut into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rl_mlx.demo.corpus import Corpus
from rl_mlx.demo.vocab import segments
from rl_mlx.errors import InvalidRequest
from rl_mlx.llm import LLM

PIECE = 64
"""Positions whose probabilities are in memory at once, in float64."""
_UNSEEN = 1_000_000  # the demo was trained on the streams of small seeds
WINDOW = 512
"""Tokens of a window, where the model's context allows and nothing else is said."""


@dataclass(frozen=True)
class Text:
    """Something to measure on; ``name`` is for people, the digest is what counts."""

    name: str
    text: str

    @cached_property
    def sha256(self) -> str:
        """Of its UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: str | Path | None = None) -> Text:
    """A UTF-8 file, or the text of nine thousand characters that is in the package.

    Raises ``InvalidRequest`` for a file that is not UTF-8, and ``OSError``.
    """
    if path is None:
        return Text(
            "evaluation.txt", files("rl_mlx.lab").joinpath("evaluation.txt").read_text("utf-8")
        )
    try:
        return Text(Path(path).name, Path(path).read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{path} is not UTF-8 (byte {error.start}); convert it first"
        ) from None


def demo_text(conversations: int = 24, seed: int = 0) -> Text:
    """Conversations that the demo model was not trained on, in its template.

    The demo knows nothing else: any other text tells little of what its quantization costs.
    """
    stream = Corpus().conversations(_UNSEEN + seed)
    whole = (c for c in stream if c.text is None)
    parts = [part for c in islice(whole, conversations) for part, _ in segments(c)]
    return Text(f"{conversations} conversations", "".join(parts))


@dataclass(frozen=True)
class Window:
    """One forward: the token ids that go in, and which of its outputs count.

    Output ``first + i`` is to predict ``targets[i]``; those before it had their turn in an earlier
    window.
    """

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    first: int


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text as the token ids of one vocabulary, and the windows that slide over it.

    Every window has ``window`` inputs, the first of them ``bos`` where the model wants one, and
    begins ``stride`` tokens after the one before. Each token is predicted once, after at least
    ``window - stride`` others except in the first window. Without a ``bos`` nothing goes before the
    first token, which is then not predicted.
    """

    name: str
    sha256: str
    vocabulary: str
    """Fingerprint of the tokenizer."""
    ids: npt.NDArray[np.int32]
    bytes: int
    """Of the text that the predicted tokens stand for."""
    bos: int | None
    window: int
    stride: int

    def __post_init__(self) -> None:
        """Raises ``InvalidRequest`` for a window or a stride that makes no sense."""
        if self.window < 2:
            raise InvalidRequest(f"a window must have at least 2 tokens, not {self.window}")
        if not 1 <= self.stride <= self.window:
            raise InvalidRequest(
                f"a stride must be between 1 and the window, {self.window}, not {self.stride}"
            )

    @property
    def count(self) -> int:
        """Tokens that are predicted."""
        return len(self.ids) - (self.bos is None)

    def pieces(self) -> Iterator[int]:
        """How many tokens are looked at together: ``PIECE``, and fewer at a window's end."""
        for part in self.windows():
            for start in range(0, len(part.targets), PIECE):
                yield min(PIECE, len(part.targets) - start)

    def windows(self) -> Iterator[Window]:
        """All of them, in order."""
        lead = [] if self.bos is None else [self.bos]
        shift = 1 - len(lead)
        scored = shift
        for start in range(0, len(self.ids), self.stride):
            inputs = np.array([*lead, *self.ids[start : start + self.window - len(lead)]], np.int32)
            end = min(start + shift + len(inputs), len(self.ids))
            yield Window(inputs, self.ids[scored:end], scored - start - shift)
            scored = end
            if end == len(self.ids):
                return


def passage(
    llm: LLM,
    text: Text | str | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
) -> Passage:
    """``text`` (that of the package without one) in the vocabulary of ``llm``.

    ``window`` is 512 or the context where that is shorter, ``stride`` half a window; the first
    ``tokens`` of the text are taken, or all. Raises ``InvalidRequest`` where that is less than a
    window, or a number makes no sense.
    """
    text = read_text() if text is None else text
    if isinstance(text, str):
        text = Text("text", text)
    if window is None:
        window = min(WINDOW, llm.info.context)
    stride = max(1, window // 2) if stride is None else stride
    if window > llm.info.context:
        raise InvalidRequest(
            f"a window of {window} tokens is more than the context of {llm.info.name}, "
            f"{llm.info.context}"
        )
    if tokens is not None and tokens < 1:
        raise InvalidRequest(f"tokens must be at least 1, not {tokens}")
    tokenizer = llm.tokenizer
    ids = tokenizer.encode(text.text, add_special=False)[:tokens]
    if len(ids) < window:
        raise InvalidRequest(
            f"{text.name} has {len(ids)} tokens here, fewer than a window of {window}; take a "
            "longer text or a smaller window"
        )
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    predicted = ids if bos is not None else ids[1:]
    return Passage(
        name=text.name,
        sha256=text.sha256,
        vocabulary=tokenizer.fingerprint,
        ids=np.array(ids, np.int32),
        bytes=sum(len(tokenizer.token_bytes(token)) for token in predicted),
        bos=bos,
        window=window,
        stride=stride,
    )


def log_probs(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Natural-log probabilities ``[rows, vocab]`` of logits, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
