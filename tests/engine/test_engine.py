"""The engine over tiny models: the same tokens whatever else runs, and an end for every request."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.errors import EngineError, OutOfMemory, QueueFull
from rl_mlx.settings import KVFormat
from rl_mlx.types import Failed, Finished, Progress

FAMILIES = ["llama", "gemma3", "lfm2"]


def sequence(seed, length):
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


def prompts_of(count):
    return [sequence(100 + i, 3 + 37 * i % 150) for i in range(count)]


def alone(harness, family, prompt, **params):
    """A request's tokens when nothing else runs and nothing is cached."""
    engine = harness(family, chunk=512)
    return engine.submit(prompt, **params).ids


def preempt(engine, runner):
    """One goes back to waiting, as when memory runs out; whether there was one."""
    engine.engine._collect()
    victim = engine.scheduler.victim()
    if victim is None:
        return False
    runner.leave(victim)
    engine.scheduler.preempt(victim)
    return True


class AnyChunks(ChunkSize):
    """Chunks of any size, and what was told of their cost."""

    def __init__(self):
        super().__init__(64)
        self.random = random.Random(3)
        self.told = []

    def tokens(self, beside, *, apart=False):
        return self.random.choice([1, 2, 7, 63, 64]) if beside else self.most

    def read(self, tokens, asked, seconds, *, decoding=0):
        assert 0 < tokens <= asked
        assert seconds > 0
        self.told.append(tokens)


def assert_nothing_is_left(engine):
    """No row, no pin, no sequence."""

    def look(runner):
        nodes, pins = [runner.tree.root], 0
        while nodes:
            node = nodes.pop()
            pins += node.pins
            nodes += node.children.values()
        return runner.arena.rows, runner.arena.nbytes, pins

    assert engine.engine.call(look) == (0, 0, 0)
    assert engine.scheduler.idle
    assert not engine.engine._sequences


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_same_alone_and_among_32_others_whatever_happens(harness, family, runs_ahead):
    """With chunks of any size, preempted in between, and once more after prefix hits."""
    prompts = prompts_of(33)
    want = [alone(harness, family, p, max_tokens=12) for p in prompts[::8]]
    engine = harness(family, chunks=AnyChunks(), runs_ahead=runs_ahead)
    for _ in range(2):
        answers = engine.together(prompts, max_tokens=12)
        for _ in range(6):
            engine.engine.call(lambda runner: preempt(engine, runner))
        assert [a.ids for a in answers[::8]] == want
    assert all(a.end.timings.reused > 0 for a in answers if a.end.timings.prompt_tokens > 65)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_same_with_a_prefix_hit(harness, family):
    prompts = [sequence(1, n) for n in (150, 200, 64, 100)]  # each the beginning of the next
    want = [alone(harness, family, p) for p in prompts]
    engine = harness(family)
    for prompt, ids in zip(prompts, want):
        answer = engine.submit(prompt)
        assert answer.ids == ids
    again = engine.submit(prompts[1])
    assert again.ids == want[1]
    assert again.end.timings.reused >= 128
    if family != "lfm2":  # a recurrent layer can go on from whole blocks alone
        assert again.end.timings.reused == 199


@pytest.mark.parametrize("family", [*FAMILIES, "qwen35"])
def test_greedy_is_the_same_after_preemption(harness, family):
    prompts = prompts_of(5)
    want = [alone(harness, family, p, max_tokens=40) for p in prompts]
    engine = harness(family, runs_ahead=True)
    answers = engine.together(prompts, max_tokens=40)
    preempted = [engine.engine.call(lambda runner: preempt(engine, runner)) for _ in range(12)]
    assert [a.ids for a in answers] == want
    assert sum(preempted) >= 5
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("bits", ["8", "8/4@20"])
def test_quantized_kv_is_the_same_in_batches_and_after_a_hit(harness, family, bits):
    kv = KVFormat.parse(bits)
    prompts = prompts_of(6)
    engine = harness(family, kv=kv)
    want = [engine.submit(p).ids for p in prompts]
    fresh = harness(family, kv=kv)
    assert [a.ids for a in fresh.together(prompts)] == want
    assert [a.ids for a in fresh.together(prompts)] == want
    assert_nothing_is_left(fresh)


def test_a_shared_prefix_is_computed_once(harness):
    prefix = sequence(1, 128)
    prompts = [[*prefix, i, *sequence(50 + i, 5 + i)] for i in range(8)]
    engine = harness()
    answers = engine.together(prompts, max_tokens=2)
    computed = sum(a.end.timings.prompt_tokens - a.end.timings.reused for a in answers)
    assert computed == len(prefix) + sum(len(p) - len(prefix) for p in prompts)


def test_prompts_that_come_together_are_read_together(harness):
    engine = harness(chunk=256)
    prompts = [sequence(50 + i, 20 + i) for i in range(8)]
    want = [alone(harness, "llama", p) for p in prompts]
    seen = []
    build = engine.runner.build

    def watched(batch, inputs, reads):
        seen.append((len(batch), len(reads)))
        return build(batch, inputs, reads)

    engine.runner.build = watched
    assert [a.ids for a in engine.together(prompts)] == want
    assert seen[0] == (0, 8)
    assert all(reads == 0 for _, reads in seen[1:])


def test_streams_go_on_in_the_forward_that_reads_a_prompt(harness):
    long = sequence(2, 300)
    want = alone(harness, "llama", long, max_tokens=4)
    engine = harness(chunk=64)
    seen, build = [], engine.runner.build

    def watched(batch, inputs, reads):
        seen.append((len(batch), len(reads)))
        return build(batch, inputs, reads)

    engine.runner.build = watched
    stream = engine.submit(sequence(1, 10), max_tokens=800)
    while len(stream.events) < 20:
        time.sleep(0.001)
    assert engine.submit(long, max_tokens=4).ids == want
    engine.engine.cancel(stream.id)
    stream.wait()
    assert seen.count((1, 1)) > 2
    assert (0, 1) not in seen[1:]
    assert_nothing_is_left(engine)


def test_timings_say_where_the_prefix_broke(harness):
    engine = harness()
    prompt = sequence(1, 100)
    assert engine.submit(prompt).end.timings.prefix_broke == 0
    changed = [*prompt[:70], (prompt[70] + 1) % 96, *prompt[71:]]
    timings = engine.submit(changed).end.timings
    assert (timings.reused, timings.prefix_broke) == (70, 70)
    timings = engine.submit(prompt).end.timings
    assert (timings.reused, timings.prefix_broke) == (99, None)


def test_the_next_turn_reuses_the_whole_conversation(harness):
    engine = harness()
    turn = sequence(1, 90)
    answer = engine.submit(turn, max_tokens=30).ids
    timings = engine.submit(turn + answer + sequence(2, 10)).end.timings
    assert timings.reused >= 90 + 29


def test_seeds_are_kept_whatever_else_runs(harness):
    prompts = prompts_of(6)
    options = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 12, "seed": 42}
    want = [alone(harness, "llama", p, **options) for p in prompts]
    engine = harness()
    assert [a.ids for a in engine.together(prompts, **options)] == want
    assert want[0] != alone(harness, "llama", prompts[0], **{**options, "seed": 43})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_same_whatever_the_chunks_beside_running_streams(harness, family):
    prompts = prompts_of(6)
    want = [alone(harness, family, p) for p in prompts]
    chunks = AnyChunks()
    engine = harness(family, chunks=chunks)
    assert [a.ids for a in engine.together(prompts)] == want
    assert sum(chunks.told) == sum(map(len, prompts))
    assert len(chunks.told) > 2 * len(prompts)
    assert [a.ids for a in engine.together(prompts)] == want  # what they left in the tree is right


def test_penalties_work_in_a_batch_with_others(harness):
    prompts = prompts_of(4)
    options = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "dry_multiplier": 0.8}
    want = alone(harness, "llama", prompts[0], max_tokens=24, **options)
    plain = [alone(harness, "llama", p, max_tokens=24) for p in prompts[1:]]
    assert want != alone(harness, "llama", prompts[0], max_tokens=24)
    engine = harness()
    others = [engine.submit(p, max_tokens=24) for p in prompts[1:]]
    assert engine.submit(prompts[0], max_tokens=24, **options).ids == want
    assert [a.ids for a in others] == plain


def test_an_end_of_sequence_is_not_emitted(harness):
    engine = harness()
    prompt = sequence(3, 20)
    ids = engine.submit(prompt).ids
    stop = ids[5]
    first = ids.index(stop)
    answer = engine.submit(prompt, eos=[stop])
    assert (answer.ids, answer.end.reason) == (ids[:first], "stop")
    assert engine.submit(prompt, eos=[stop], ignore_eos=True).ids == ids
    assert engine.submit(prompt, stop_token_ids=[stop]).end.reason == "stop"


def test_progress_is_told_while_the_prompt_is_read(harness):
    engine = harness(chunk=64)
    events = engine.submit(sequence(1, 200), max_tokens=1).wait().events
    progress = [(e.done, e.total) for e in events if isinstance(e, Progress)]
    assert progress == [(64, 200), (128, 200), (192, 200), (200, 200)]


def test_prefixes_kept_for_later_count_as_memory_held(harness):
    engine = harness()
    assert engine.engine.counts() == (0, 0, 0)
    engine.submit(sequence(1, 200)).wait()
    held = engine.engine.call(lambda runner: runner.tree.nbytes)
    assert engine.engine.counts() == (0, 0, held)
    assert held > 0


def test_no_tokens_asked_for_none_given(harness):
    engine = harness()
    answer = engine.submit(sequence(1, 5), max_tokens=0)
    assert (answer.ids, answer.end.reason) == ([], "length")


def test_memory_that_runs_out_preempts_and_all_end_the_same(harness):
    prompts = [sequence(i, 200) for i in range(4)]
    want = [alone(harness, "llama", p, max_tokens=120) for p in prompts]
    probe = harness()
    two_rows = probe.runner.arena.bytes_for(2, 256) + probe.runner.arena.bytes_for(1, 256)
    engine = harness(room=two_rows)
    answers = engine.together(prompts, max_tokens=120)
    assert [a.ids for a in answers] == want
    assert_nothing_is_left(engine)


def test_a_request_too_big_for_the_budget_fails_alone(harness):
    probe = harness()
    engine = harness(room=probe.runner.arena.bytes_for(1, 256))
    big = engine.submit(sequence(1, 600))
    assert isinstance(big.end, Failed)
    assert isinstance(big.end.error, OutOfMemory)
    assert len(engine.submit(sequence(2, 30)).ids) == 16
    assert_nothing_is_left(engine)


def test_the_budget_is_never_passed(harness):
    probe = harness()
    room = probe.runner.arena.bytes_for(3, 512)
    engine = harness(room=room)
    used = []
    step = engine.engine._step

    def watched():
        step()
        used.append(engine.runner.arena.nbytes + engine.runner.tree.nbytes)

    engine.engine._step = watched
    answers = engine.together([sequence(i, 40 + 45 * i) for i in range(9)], max_tokens=60)
    assert all(isinstance(a.end, Finished) for a in answers)
    assert max(used) <= room


def test_a_failing_step_fails_its_requests_and_the_engine_lives(harness, monkeypatch):
    engine = harness()
    prompt = sequence(1, 10)
    want = engine.submit(prompt).ids
    broken = {"on": True}
    forward = engine.runner._model.forward

    def fail(tokens, step):
        if broken["on"]:
            raise RuntimeError("the device is gone")
        return forward(tokens, step)

    monkeypatch.setattr(engine.runner._model, "forward", fail)
    end = engine.submit(sequence(2, 10)).end
    assert isinstance(end, Failed)
    assert isinstance(end.error, EngineError)
    assert "the device is gone" in str(end.error)
    broken["on"] = False
    assert engine.submit(prompt).ids == want
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("method", ["admits", "enter", "make_room", "build", "start", "save"])
def test_whatever_fails_the_engine_serves_on(harness, monkeypatch, method):
    engine = harness(rows=2)
    prompt = sequence(1, 10)
    want = engine.submit(prompt).ids
    whole = getattr(engine.runner, method)
    fails = {"left": 1}

    def fail(*args, **options):
        if fails["left"]:
            fails["left"] -= 1
            raise RuntimeError("the device is gone")
        return whole(*args, **options)

    monkeypatch.setattr(engine.runner, method, fail)
    answers = engine.together([sequence(i, 70) for i in range(2, 6)])
    assert sum(isinstance(a.end, Failed) for a in answers) in {1, 2}
    assert engine.submit(prompt).ids == want
    assert_nothing_is_left(engine)


def test_a_full_queue_refuses_at_once(harness):
    engine = harness(queue=3)
    with pytest.raises(QueueFull, match="3 requests are waiting already; try again later"):
        engine.together([sequence(i, 5) for i in range(5)], max_tokens=2)
    assert len(engine.submit(sequence(1, 10)).ids) == 16


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_cancelling_at_every_stage(harness, runs_ahead):
    engine = harness(rows=2, runs_ahead=runs_ahead)
    waiting = engine.together([sequence(i, 150) for i in range(6)], max_tokens=500)
    for answer in reversed(waiting):
        engine.engine.cancel(answer.id)
    assert {a.end.reason for a in waiting} == {"cancelled"}
    engine.engine.cancel("nobody")
    assert len(engine.submit(sequence(1, 10)).ids) == 16
    assert_nothing_is_left(engine)


def test_a_crowd_with_random_cancels_leaves_nothing_behind(harness):
    rng = random.Random(7)
    engine = harness(rows=6, room=4_000_000)
    answers = []
    for _ in range(120):
        answers.append(
            engine.submit(
                sequence(rng.randrange(8), rng.randrange(1, 140)),
                max_tokens=rng.randrange(0, 30),
                temperature=rng.choice([0, 0.8]),
                priority=rng.randrange(3),
                logprobs=rng.choice([None, 2]),
            )
        )
        if rng.random() < 0.3:
            engine.engine.cancel(rng.choice(answers).id)
    for answer in answers:
        ends = [e for e in answer.wait().events if isinstance(e, Finished | Failed)]
        assert len(ends) == 1
        assert isinstance(ends[0], Finished)
    assert_nothing_is_left(engine)


def test_closing_ends_everything(harness):
    engine = harness()
    answers = engine.together(prompts_of(5), max_tokens=5000)
    engine.engine.close()
    assert {a.end.reason for a in answers} == {"cancelled"}
    engine.engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit([1])
