"""The log-probabilities of a model along a text, in a file: a large reference is computed once.

The idea is that of llama-perplexity's ``--kl-divergence-base``, the format is our own, all
little-endian:

- 8 bytes ``RLMLXLP1``, uint32 length of the header, the header in JSON: ``model``, ``backend``,
  ``vocab`` (numbers in a row), ``rows``, and the fields of ``Passage`` but for its ids;
- the token ids of the text, int32;
- for each token that is predicted a row: float32 ``low``, float32 ``step``, uint16 ``[vocab]``
  codes. A log-probability is ``low + step * code``, with the row's probabilities then brought to
  the sum of 1. Rounding moves it by ``step / 2`` at most, some 2e-4 nats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.errors import DestinationExists, FormatError
from rl_mlx.lab.text import Passage, log_probs
from rl_mlx.llm import LLM

MAGIC = b"RLMLXLP1"
_LEVELS = 65535
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """An open file: whose it is, of what, and its rows."""

    path: Path
    model: str
    backend: str
    vocab: int
    passage: Passage
    _rows: npt.NDArray[Any]

    @classmethod
    def open(cls, path: str | Path) -> Reference:
        """Open by its header; rows are read when asked for.

        Raises ``FormatError`` for what is no such file or is not complete, and ``OSError``.
        """
        path = Path(path)
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise FormatError(
                    f"{path} holds no log-probabilities; eval perplexity --save-logits makes such "
                    "files"
                )
            try:
                header = json.loads(file.read(int.from_bytes(file.read(4), "little")))
                model, backend, vocab, rows, count = (
                    header.pop(key) for key in ("model", "backend", "vocab", "rows", "ids")
                )
                ids = np.frombuffer(file.read(4 * count), "<i4")
                cut = Passage(ids=ids, **header)
                at, dtype = file.tell(), _row(vocab)
                if (
                    len(ids) != count
                    or cut.count != rows
                    or path.stat().st_size != at + rows * dtype.itemsize
                ):
                    raise FormatError(f"{path} is not complete; make it again")
                mapped = np.memmap(path, dtype, "r", at, (rows,))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise FormatError(f"{path} is damaged ({error}); make it again") from error
        return cls(path, model, backend, vocab, cut, mapped)

    def rows(self, start: int, stop: int) -> F64:
        """Log-probabilities ``[stop - start, vocab]`` of the tokens predicted from ``start`` on."""
        found = self._rows[start:stop]
        wide: F64 = found["codes"].astype(np.float64)
        wide *= found["step"][:, None]
        return log_probs(wide)


def is_reference(path: str | Path) -> bool:
    """Whether a file begins as those do."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@contextmanager
def write_reference(
    path: str | Path, llm: LLM, cut: Passage, *, force: bool = False
) -> Iterator[Callable[[F64], None]]:
    """Gives a function that takes the rows in order; the file has its name when all are there.

    Raises ``DestinationExists`` without ``force``, and ``OSError``.
    """
    path = Path(path)
    if path.exists() and not force:
        raise DestinationExists(f"{path} exists; choose another name or use --force")
    about: dict[str, Any] = asdict(cut)
    about |= {"ids": len(cut.ids), "model": llm.info.name, "backend": llm.info.backend}
    about |= {"vocab": llm.info.vocab, "rows": cut.count}
    header = json.dumps(about).encode()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(MAGIC + len(header).to_bytes(4, "little") + header)
            file.write(cut.ids.astype("<i4").tobytes())

            def write(rows: F64) -> None:
                file.write(_packed(rows))

            yield write
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _row(vocab: int) -> np.dtype[Any]:
    return np.dtype([("low", "<f4"), ("step", "<f4"), ("codes", "<u2", (vocab,))])


def _packed(rows: F64) -> bytes:
    found = np.empty(len(rows), _row(rows.shape[1]))
    low = rows.min(axis=1)
    step = ((rows.max(axis=1) - low) / _LEVELS).astype(np.float32)
    codes = rows - low[:, None]
    codes /= np.where(step > 0, step, 1)[:, None]
    found["low"], found["step"] = low, step
    found["codes"] = np.rint(codes.clip(0, _LEVELS))
    return found.tobytes()
