"""Answers that must follow a grammar do, on both backends, in batches, sampled, and with drafts."""

from __future__ import annotations

import json
import re

import pytest

from rl_mlx import LLM
from rl_mlx.errors import InvalidRequest
from rl_mlx.types import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a very long constant", "another long constant"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
CODE = Grammar("regex", r"[0-9]{3}-[a-z]{4}")


@pytest.fixture(scope="module", params=["mlx", "llama.cpp", "mlx with a draft"])
def llm(request):
    backend, _, draft = request.param.partition(" with a ")
    options = {"draft": "auto", "draft_tokens": 3} if draft else {}
    if backend == "llama.cpp":
        options["backend_options"] = {"threads": 1}
    with LLM("demo", backend=backend, **options) as opened:
        yield opened


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_json_follows_its_schema(llm, temperature):
    result = llm.chat(
        [{"role": "user", "content": "hello"}],
        grammar=JSON, temperature=temperature, seed=4, max_tokens=150,
    )  # fmt: skip
    value = json.loads(result.text)
    assert result.finish_reason == "stop"
    assert list(value) == ["name", "age", "kind"]
    assert len(value["name"]) <= 10
    assert 0 <= value["age"] <= 120
    assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]


def test_a_batch_follows_and_others_are_left_alone(llm):
    free = llm.generate("Once upon a time", temperature=0, max_tokens=12).text
    for result in llm.generate(["a", "b", "c"], grammar=CODE, temperature=1, max_tokens=40):
        assert re.fullmatch(CODE.text, result.text)
    assert llm.generate("Once upon a time", temperature=0, max_tokens=12).text == free


def test_what_max_tokens_cuts_is_said_to_be_cut(llm):
    result = llm.generate("x", grammar=JSON, max_tokens=4)
    assert result.finish_reason == "length"


def test_what_is_forced_takes_fewer_forwards():
    with LLM("demo", backend="mlx") as llm:
        result = llm.generate("x", grammar=JSON, temperature=0, max_tokens=150)
    assert result.timings.forwards < len(result.token_ids)


def test_a_grammar_that_is_not_supported_is_refused(llm):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    with pytest.raises(InvalidRequest, match="not"):
        llm.generate("x", grammar=Grammar("json_schema", json.dumps(schema)))
    assert llm.generate("x", max_tokens=2).usage.completion_tokens <= 2
