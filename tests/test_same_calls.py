"""``LLM`` over each backend: what lies above the token ids is one code, and gives the same."""

from __future__ import annotations

import re
import time

import pytest

from rl_mlx import LLM
from rl_mlx.errors import ContextOverflow, InvalidRequest, RlMlxError
from rl_mlx.text.router import Format, Router, collect
from rl_mlx.types import Grammar

BACKENDS = ("mlx", "llama.cpp")
QUESTION = [{"role": "user", "content": "What is rl-mlx?"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
ROUTED = '<think>so be it</think>Here.<tool_call>{"name": "now", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def both():
    options = {"context": 256, "draft": "lookup", "draft_tokens": 2}
    opened = {
        "mlx": LLM("demo", backend="mlx", **options),
        "llama.cpp": LLM("demo", backend="llama.cpp", backend_options={"threads": 1}, **options),
    }
    yield opened
    for llm in opened.values():
        llm.close()


@pytest.fixture(params=BACKENDS)
def llm(request, both):
    return both[request.param]


def test_the_same_prompt_and_the_same_answer(both):
    first, second = (both[name].chat(QUESTION, temperature=0, max_tokens=30) for name in BACKENDS)
    assert first.text == second.text
    assert first.token_ids == second.token_ids
    assert first.usage == second.usage
    assert first.finish_reason == second.finish_reason


def test_stop_strings_end_the_text_and_are_not_in_it(llm):
    whole = llm.generate("Once upon a time", temperature=0, max_tokens=24, ignore_eos=True)
    stop = whole.text[10:14]
    ended = llm.generate(
        "Once upon a time", temperature=0, max_tokens=24, ignore_eos=True, stop=["never", stop]
    )
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert (ended.finish_reason, ended.stop) == ("stop", stop)
    chunks = list(
        llm.generate("Once upon a time", temperature=0, max_tokens=24, ignore_eos=True,
                     stop=[stop], stream=True)
    )  # fmt: skip
    assert "".join(c.text for c in chunks) == ended.text
    assert (chunks[-1].finish_reason, chunks[-1].stop) == ("stop", stop)
    assert [t for c in chunks for t in c.token_ids] == ended.token_ids


def test_usage_and_timings(llm):
    prompt = llm.tokenize("Once upon a time there was a fox.")
    (first, second) = llm.generate([prompt, prompt[:-1]], temperature=0, max_tokens=9, logprobs=1,
                                   ignore_eos=True)  # fmt: skip
    for result, length in ((first, len(prompt)), (second, len(prompt) - 1)):
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (length, 9)
        timings = result.timings
        assert (timings.prompt_tokens, timings.generated) == (length, 9)
        assert timings.forwards + timings.accepted >= 9
        assert 0 <= timings.accepted <= timings.drafted
        assert [p.token for p in result.logprobs] == result.token_ids
        assert all(p.top[0][0] == p.token for p in result.logprobs)  # greedy: the likeliest


def test_reasoning_and_calls_of_tools_are_routed(llm):
    """A grammar makes any model say what one that reasons and calls tools would."""
    router = Router(Format.of("<tool_call>"), tools=TOOLS)
    options = {"grammar": Grammar("regex", re.escape(ROUTED)), "max_tokens": 90}
    pieces = []
    for chunk in llm.chat(QUESTION, temperature=1.0, stream=True, **options):
        pieces += router.feed(chunk.text)
    routed = collect([*pieces, *router.flush()])
    assert (routed.reasoning, routed.content) == ("so be it", "Here.")
    assert [(c.name, c.arguments) for c in routed.calls] == [("now", "{}")]


def test_leaving_a_stream_cancels_the_request(llm):
    stream = llm.generate("Once", stream=True, ignore_eos=True, temperature=1.0)
    while not next(stream).text:
        pass
    stream.close()
    for _ in range(1000):  # the backend hears of it within a step
        if llm.stats().running == 0:
            break
        time.sleep(0.01)
    assert llm.stats().running == 0
    assert llm.generate("Once", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


def test_refusals_are_errors_of_ours(llm):
    for kind, call in (
        (InvalidRequest, lambda: llm.generate("")),
        (InvalidRequest, lambda: llm.generate([5, 1 << 20])),
        (InvalidRequest, lambda: llm.generate("x", temperature=-1)),
        (InvalidRequest, lambda: llm.generate("x", top_q=1)),
        (InvalidRequest, lambda: llm.generate("x", grammar=Grammar("regex", "("))),
        (ContextOverflow, lambda: llm.generate([5] * 256)),
        (ContextOverflow, lambda: llm.logits([5] * 257)),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, RlMlxError)
        assert "\n" not in str(caught.value)
