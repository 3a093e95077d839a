"""Chunks on threads."""

from __future__ import annotations

import numpy as np
import pytest

from rl_mlx.convert.chunks import in_chunks


@pytest.mark.parametrize(("count", "step"), [(0, 4), (1, 4), (4, 4), (5, 4), (103, 7), (9, 1)])
def test_every_index_once(count: int, step: int) -> None:
    seen = np.zeros(count, int)
    lengths = []

    def work(chunk: slice) -> None:
        seen[chunk] += 1
        lengths.append(chunk.stop - chunk.start)

    in_chunks(count, step, work)
    assert (seen == 1).all()
    assert all(0 < length <= step for length in lengths)


def test_an_exception_comes_out() -> None:
    def work(chunk: slice) -> None:
        if chunk.start == 8:
            raise OverflowError("eight")

    with pytest.raises(OverflowError, match="eight"):
        in_chunks(20, 2, work)
