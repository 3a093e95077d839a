"""What nobody should send, on each backend: refused or ended, and the next request is answered."""

from __future__ import annotations

import threading

import pytest

from rl_mlx import LLM
from rl_mlx.errors import ContextOverflow, InvalidRequest, QueueFull
from rl_mlx.types import Failed, Finished, Progress, Request, SamplingParams, Token

CONTEXT = 256
LONG = {"temperature": 1.0, "ignore_eos": True}


@pytest.fixture(scope="module", params=["mlx", "llama.cpp"])
def llm(request):
    options = {"threads": 1} if request.param == "llama.cpp" else {}
    with LLM(
        "demo", backend=request.param, context=CONTEXT, backend_options=options, dtype="float32"
    ) as opened:
        yield opened


@pytest.fixture(autouse=True)
def serves_on(llm):
    """After every test the answer is what it was before, and nothing is left behind."""
    options = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    before = llm.generate("Once upon a time", **options).token_ids
    yield
    assert llm.generate("Once upon a time", **options).token_ids == before
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, InvalidRequest),
        ([[]], {}, InvalidRequest),
        ([5] * CONTEXT, {}, ContextOverflow),
        ([5] * 10 * CONTEXT, {}, ContextOverflow),
        ("x", {"max_tokens": -1}, InvalidRequest),
        ("x", {"temperature": float("nan")}, InvalidRequest),
        ("x", {"top_p": float("inf")}, InvalidRequest),
        ("x", {"xtc_threshold": 0.6}, InvalidRequest),
        ("x", {"top_k": -1}, InvalidRequest),
        ("x", {"logit_bias": {5: float("nan")}}, InvalidRequest),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refused_at_once(llm, prompt, options, error):
    with pytest.raises(error):
        llm.generate(prompt, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"top_k": 1 << 20},
        {"xtc_threshold": 0.5, "xtc_probability": 1.0},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"logit_bias": {10**9: 1.0}},
        {"stop_token_ids": (10**9,)},
        {"logprobs": 100},
    ],
    ids=str,
)
def test_odd_but_allowed(llm, options):
    result = llm.generate("Once", **{"max_tokens": 5, **LONG, **options})
    assert len(result.token_ids) == options.get("max_tokens", 5)
    assert result.finish_reason == "length"


def test_ten_thousand_requests_at_once(llm):
    backend, ends, lock = llm._llm._backend, {}, threading.Lock()
    done = threading.Event()
    queued, refused = [], 0

    def emit(name, event):
        if isinstance(event, Finished | Failed):
            with lock:
                ends[name] = ends.get(name, 0) + 1

    params = SamplingParams(max_tokens=200, **LONG)
    for i in range(10_000):
        request = Request(id=f"many-{i}", prompt=(5, 6, 7), params=params)
        try:
            backend.submit(request, lambda event, name=request.id: emit(name, event))
        except QueueFull:
            refused += 1
        else:
            queued.append(request.id)
    assert refused > 5000
    for name in queued:
        backend.cancel(name)
    for _ in range(6000):
        if len(ends) == len(queued):
            break
        done.wait(0.01)
    assert ends == dict.fromkeys(queued, 1)


def test_a_consumer_that_stops_reading_holds_nobody_up(llm):
    streams = [llm.generate("Once", stream=True, **LONG) for _ in range(3)]
    for stream in streams:
        next(stream)  # and no more
    assert len(llm.generate("There was", max_tokens=20, **LONG).token_ids) == 20
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("stage", ["queued", "prefill", "decode", "ended"])
def test_cancelled_at_every_stage(llm, stage):
    backend, events = llm._llm._backend, []
    ended = threading.Event()
    wanted = {"queued": object, "prefill": Progress, "decode": Token, "ended": Finished}[stage]

    def emit(event):
        events.append(event)
        if isinstance(event, wanted):
            backend.cancel("doomed")  # from the engine's own thread, in the middle of its step
        if isinstance(event, Finished | Failed):
            ended.set()

    limit = 3 if stage == "ended" else 200
    params = SamplingParams(max_tokens=limit, **LONG)
    backend.submit(Request(id="doomed", prompt=(5, 6, 7), params=params), emit)
    if stage == "queued":
        backend.cancel("doomed")
    assert ended.wait(60)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == ("length" if stage == "ended" else "cancelled")
    assert sum(isinstance(e, Finished | Failed) for e in events) == 1
