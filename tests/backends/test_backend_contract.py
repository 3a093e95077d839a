"""What every backend must do alike, on each of them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_mlx.backends.base import Backend
from rl_mlx.errors import ContextOverflow, EngineError, InvalidRequest
from rl_mlx.types import Finished, Progress

pytestmark = pytest.mark.shared
BACKENDS = ("llama.cpp", "mlx")
PARITY = ("gemma2", "gemma3_text", "gpt_oss", "lfm2", "llama", "llama3-rope", "mixtral", "qwen2",
          "qwen3", "qwen3_moe")  # fmt: skip
# Relative to the largest logit. llama.cpp rounds what meets a float16 weight to float16; MLX on a
# CPU does not.
TOLERANCE = {"llama.cpp": 1.5e-2, "mlx": 1e-3}
EOS = 2


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    module = {"mlx": "mlx", "llama.cpp": "xllamacpp"}[chosen]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    return chosen


@pytest.fixture
def backend(name: str, stories: Path, open_model: Any) -> Backend:
    opened: Backend = open_model(stories, backend=name, context=512)
    return opened


@pytest.fixture
def golden(shared: Path) -> list[int]:
    """Greedy ids after BOS, computed by others from the original checkpoint."""
    path = shared / "models" / "stories260K.greedy.json"
    ids: list[int] = json.loads(path.read_text())["greedy_ids_from_bos"]
    return ids[1:]


def test_greedy_ids_are_the_golden_ones(backend: Backend, ask: Any, golden: list[int]) -> None:
    reply = ask(backend, [1], max_tokens=len(golden))
    assert reply.ids == golden
    assert reply.finished.reason == "length"


def test_info_describes_the_model(backend: Backend, name: str) -> None:
    info = backend.info
    assert (info.backend, info.architecture, info.vocab, info.hidden) == (name, "llama", 512, 64)
    assert (info.layers, info.context, info.parameters) == (5, 512, 292800)
    assert info.bits_per_weight == 32
    assert info.weight_bytes == 4 * info.parameters


@pytest.mark.parametrize("model", PARITY)
def test_logits_of_every_position_match_the_reference(
    name: str, model: str, shared: Path, open_model: Any
) -> None:
    reference = np.load(shared / "parity" / f"{model}.npz")
    ids, expected = reference["ids"].ravel().tolist(), reference["logits"].reshape(-1, 1000)
    logits = open_model(shared / "parity" / f"{model}.gguf", backend=name).logits(ids)
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= TOLERANCE[name] * np.abs(expected).max()


@pytest.mark.parametrize("model", PARITY)
def test_the_same_greedy_text_on_all_backends_where_the_gap_is_clear(
    model: str, shared: Path, open_model: Any, ask: Any
) -> None:
    """Where the two likeliest tokens are close, rounding may choose, and the texts part; the first
    backend's text, fed to the second, shows that they agree wherever it is clear.
    """
    path = shared / "parity" / f"{model}.gguf"
    prompt = np.load(path.with_suffix(".npz"))["ids"].ravel().tolist()[:16]
    first, second = (open_model(path, backend=name) for name in BACKENDS)
    text = ask(first, prompt, max_tokens=32, logprobs=2)
    clear = np.array([p.top[0][1] - p.top[1][1] > 1e-2 for p in text.logprobs])
    assert clear.sum() >= 30
    fed = second.logits([*prompt, *text.ids[:-1]])[len(prompt) - 1 :].argmax(axis=1)
    assert fed[clear].tolist() == np.array(text.ids)[clear].tolist()
    parted = 32 if clear.all() else int(clear.argmin())
    assert ask(second, prompt, max_tokens=32).ids[:parted] == text.ids[:parted]


def test_eos_ends_the_answer_and_is_not_part_of_it(
    backend: Backend, ask: Any, golden: list[int]
) -> None:
    place = 10
    ended = ask(backend, [1], eos=[golden[place]], max_tokens=40)
    assert ended.ids == golden[: golden.index(golden[place])]
    assert ended.finished.reason == "stop"
    stopped = ask(backend, [1], stop_token_ids=(golden[place],), max_tokens=40)
    assert stopped.ids == ended.ids
    ignored = ask(backend, [1], eos=[golden[place]], max_tokens=40, ignore_eos=True)
    assert ignored.ids == golden[:40]


def test_no_tokens_asked_for_none_given(backend: Backend, ask: Any) -> None:
    reply = ask(backend, [1], max_tokens=0)
    assert reply.ids == []
    assert reply.finished.reason == "length"


def test_without_a_limit_the_answer_fills_the_context(
    name: str, stories: Path, open_model: Any, ask: Any
) -> None:
    small = open_model(stories, backend=name, context=64)
    reply = ask(small, [1, 403, 407], ignore_eos=True)
    assert len(reply.ids) == 61
    assert reply.finished.reason == "length"
    with pytest.raises(ContextOverflow, match="64"):
        ask(small, [1] * 64)


def test_a_bad_prompt_is_refused_at_once_and_hurts_nobody(
    backend: Backend, ask: Any, golden: list[int]
) -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        ask(backend, [])
    with pytest.raises(InvalidRequest, match="no tokens"):
        backend.logits([])
    assert ask(backend, [1], max_tokens=5).ids == golden[:5]


def test_many_at_once_give_what_each_gives_alone(backend: Backend, start: Any, ask: Any) -> None:
    prompts = [
        [1, 403, 407, 261, 378],
        [1],
        [1, 300 + 7, 5, 9],
        [1] * 70,
        [1, 403, 407, 261, 379],
    ] * 3
    alone = [ask(backend, p, max_tokens=24).ids for p in prompts[:5]]
    calls = [start(backend, p, max_tokens=24) for p in prompts]
    assert [c.reply().ids for c in calls] == alone * 3


def test_a_seed_gives_the_same_answer_alone_and_in_company(
    backend: Backend, start: Any, ask: Any
) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "min_p": 0.0, "max_tokens": 30}
    alone = ask(backend, [1], seed=7, **options).ids
    calls = [start(backend, [1], seed=seed, **options) for seed in (1, 7, 3, 7)]
    together = [c.reply().ids for c in calls]
    assert together[1] == together[3] == alone
    assert len({tuple(ids) for ids in together}) == 3
    assert ask(backend, [1], **options).ids != ask(backend, [1], **options).ids


SAMPLING: list[dict[str, Any]] = [
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 1.5},
    {"temperature": 0, "repetition_penalty": 1.5, "penalty_window": 8},
    {"frequency_penalty": 0.8, "presence_penalty": -0.4},
    {"xtc_probability": 0.6, "xtc_threshold": 0.05},
    {"dry_multiplier": 1.0, "dry_allowed_length": 1, "temperature": 0.3},
    {"logit_bias": {403: 4.0, 261: -100.0}},
]


def test_settings_and_seeds_mean_the_same_on_all_backends(
    stories: Path, open_model: Any, ask: Any
) -> None:
    first, second = (open_model(stories, backend=name) for name in BACKENDS)
    texts = set()
    for options in SAMPLING:
        options = {"temperature": 0.8, "min_p": 0.0, "seed": 11, "max_tokens": 40, **options}
        ids = ask(first, [1, 403], **options).ids
        assert ask(second, [1, 403], **options).ids == ids, options
        texts.add(tuple(ids))
    assert len(texts) == len(SAMPLING)  # none of the settings was ignored


def test_logprobs_are_natural_and_of_the_raw_distribution(backend: Backend, ask: Any) -> None:
    reply = ask(
        backend, [1, 403], max_tokens=4, logprobs=3, temperature=2.0, seed=1, logit_bias={9: 50.0}
    )
    assert reply.ids == [9] * 4
    ids = [1, 403, *reply.ids]
    raw = backend.logits(ids).astype(np.float64)
    expected = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    for place, got in enumerate(reply.logprobs, start=1):
        assert math.isclose(got.logprob, expected[place, got.token], abs_tol=1e-3)
        best = np.argsort(-expected[place])[:3]
        assert [t for t, _ in got.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in got.top], expected[place][best], atol=1e-3)


def test_cancelling_ends_a_request_and_only_that(
    backend: Backend, start: Any, golden: list[int]
) -> None:
    doomed = start(backend, [1, 403], ignore_eos=True, temperature=1.0)
    other = start(backend, [1], max_tokens=60)
    doomed.first()
    backend.cancel(doomed.id)
    backend.cancel("nobody")
    reply = doomed.reply()
    assert reply.finished.reason == "cancelled"
    assert len(reply.ids) < 500
    assert other.reply().ids == golden[:60]


def test_parallel_says_how_many_run_at_once(
    name: str, stories: Path, open_model: Any, start: Any
) -> None:
    alone = open_model(stories, backend=name, context=512, parallel=1)
    first = start(alone, [1, 5], ignore_eos=True)
    first.first()
    second = start(alone, [1, 6], max_tokens=1)
    while (stats := alone.stats()).waiting == 0:
        assert stats.running == 1
    alone.cancel(first.id)
    assert len(second.reply().ids) == 1
    both = open_model(stories, backend=name, context=512, parallel=2)
    first, second = (start(both, [1, n], ignore_eos=True) for n in (5, 6))
    first.first()
    second.first()
    assert both.stats().running == 2
    both.cancel(first.id)
    both.cancel(second.id)


def test_timings_and_progress_add_up(backend: Backend, ask: Any) -> None:
    prompt = [1, *range(3, 103)]
    reply = ask(backend, prompt, max_tokens=8)
    assert reply.progress[-1] == Progress(101, 101)
    timings = reply.finished.timings
    assert (timings.prompt_tokens, timings.generated) == (101, 8)
    assert timings.prefill > 0
    assert timings.decode > 0
    assert timings.forwards >= 8
    assert timings.queued >= 0


def test_timings_say_what_was_reused_and_where_the_prefix_broke(backend: Backend, ask: Any) -> None:
    prompt = [1, *range(3, 103)]

    def reused(ids: list[int]) -> tuple[int, int | None]:
        timings = ask(backend, ids, max_tokens=2, ignore_eos=True).finished.timings
        return timings.reused, timings.prefix_broke

    assert reused(prompt) == (0, 0)
    assert reused(prompt) == (100, None)
    assert reused([*prompt[:70], 400, *prompt[71:]]) == (70, 70)


def test_embeddings_are_unit_vectors_of_the_text(backend: Backend) -> None:
    first, second = backend.embed([1, 403, 407]), backend.embed([1, 300, 17, 40])
    assert first.shape == (64,)
    assert math.isclose(float(np.linalg.norm(first)), 1, rel_tol=1e-5)
    np.testing.assert_array_equal(first, backend.embed([1, 403, 407]))
    assert float(first @ second) < 0.999


def test_embeddings_are_the_same_on_all_backends(stories: Path, open_model: Any) -> None:
    first, second = (
        open_model(stories, backend=name).embed([1, 403, 407, 261]) for name in BACKENDS
    )
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_closing_cancels_what_runs_and_refuses_the_rest(backend: Backend, start: Any) -> None:
    call = start(backend, [1], ignore_eos=True, temperature=1.0)
    call.first()
    backend.close()
    backend.close()
    last = call.reply().events[-1]
    assert isinstance(last, Finished)
    assert last.reason in {"cancelled", "length"}
    with pytest.raises(EngineError, match="closed"):
        start(backend, [1])
