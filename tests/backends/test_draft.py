"""Drafts that are not what they should be: an error at the start, or a note and the same answer."""

from __future__ import annotations

import pytest

from rl_mlx import LLM
from rl_mlx.errors import InvalidRequest, ModelNotFound
from rl_mlx.store import resolve

OPTIONS = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module")
def small():
    """The demo's draft model, as a target."""
    return str(resolve("demo").path.with_name("draft.gguf"))


def test_one_larger_than_the_model_is_a_note_and_the_same_answer(small):
    with LLM(small, backend="mlx") as llm:
        want = llm.generate("Once upon a time", **OPTIONS).token_ids
    with LLM(small, backend="mlx", draft="demo", draft_tokens=3) as llm:
        assert "the draft model is larger than the model" in " ".join(llm.info.notes)
        result = llm.generate("Once upon a time", **OPTIONS)
    assert result.token_ids == want
    assert 0 < result.timings.accepted <= result.timings.drafted


def test_one_that_is_not_there():
    with pytest.raises(ModelNotFound, match=r"nowhere\.gguf"):
        LLM("demo", backend="mlx", draft="/nowhere.gguf")


@pytest.mark.shared
def test_one_of_another_vocabulary(shared):
    other = str(shared / "models" / "stories260K.gguf")
    with pytest.raises(InvalidRequest, match="another vocabulary than demo"):
        LLM("demo", backend="mlx", draft=other)
