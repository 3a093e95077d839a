"""Speculation changes how fast tokens come, and nothing else about them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.engine.pace import MOST, Costs, Pace
from rl_mlx.engine.sequence import Sequence
from rl_mlx.engine.speculate import DraftModel, Lookup
from rl_mlx.errors import InvalidRequest
from rl_mlx.model.load import load_decoder
from rl_mlx.sample.sampler import Row, Sampler
from rl_mlx.sample.verify import Draft
from rl_mlx.settings import KVFormat
from rl_mlx.types import Request, SamplingParams


def sequence(seed, length):
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


def prompts_of(count):
    return [sequence(100 + i, 3 + 37 * i % 150) for i in range(count)]


@pytest.fixture
def drafts(tiny):
    """Proposers by name: the text, a model of other weights, and the model itself."""
    other = tiny("llama", num_hidden_layers=1)
    for name in other.names():
        other._tensors[name] = np.roll(other._tensors[name], 7, axis=-1)
    return {
        "lookup": lambda target: Lookup(),
        "useless": lambda target: DraftModel(load_decoder(other, 4096, "float32"), 96),
        "itself": lambda target: DraftModel(target, 96),
    }


@pytest.mark.parametrize("draft", ["lookup", "useless", "itself"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_is_the_same_with_a_draft(harness, drafts, family, draft):
    prompts = prompts_of(8)
    plain = harness(family)
    want = [plain.submit(p, max_tokens=40).ids for p in prompts]
    engine = harness(family, draft=drafts[draft], fixed=4)
    answers = engine.together(prompts, max_tokens=40)
    assert [a.ids for a in answers] == want
    drafted = sum(a.end.timings.drafted for a in answers)
    accepted = sum(a.end.timings.accepted for a in answers)
    assert drafted > 0
    if draft == "itself":
        assert accepted > 0.95 * drafted
        assert sum(a.end.timings.forwards for a in answers) < 0.4 * 40 * 8
    assert engine.engine.call(lambda r: r.arena.rows) == 0


@pytest.mark.parametrize("draft", ["lookup", "useless"])
def test_a_recurrent_target_goes_back_to_where_the_draft_was_right(harness, drafts, draft):
    prompts = [sequence(5, 4) * 8, *prompts_of(4)]
    plain = harness("lfm2")
    want = [plain.submit(p, max_tokens=40).ids for p in prompts]
    engine = harness("lfm2", draft=drafts[draft], fixed=3)
    assert [a.ids for a in engine.together(prompts, max_tokens=40)] == want


def test_a_draft_works_with_quantized_kv_prefix_hits_and_penalties(harness, drafts):
    kv = KVFormat(8, 8)
    prompts = prompts_of(4)
    options = {"repetition_penalty": 1.3, "logit_bias": {3: 2.0}, "max_tokens": 30}
    plain = harness("llama", kv=kv)
    want = [plain.submit(p, **options).ids for p in prompts]
    engine = harness("llama", kv=kv, draft=drafts["lookup"], fixed=4)
    for _ in range(2):
        assert [a.ids for a in engine.together(prompts, **options)] == want


def test_a_draft_by_measurement_gives_the_same_tokens(harness, drafts):
    prompts = prompts_of(4)
    plain = harness()
    want = [plain.submit(p, max_tokens=60).ids for p in prompts]
    engine = harness(draft=drafts["useless"])
    assert [a.ids for a in engine.together(prompts, max_tokens=60)] == want


def test_a_draft_that_breaks_is_dropped_and_the_answer_goes_on(harness, drafts, caplog):
    class Broken(Lookup):
        def propose(self, wanted):
            raise RuntimeError("no more")

    prompt = sequence(1, 20)
    want = harness().submit(prompt).ids
    engine = harness(draft=lambda target: Broken(), fixed=4)
    assert engine.submit(prompt).ids == want
    assert "going on without it" in caplog.text


def test_a_draft_model_that_fails_in_the_middle_is_dropped(harness, drafts, caplog, monkeypatch):
    prompts = prompts_of(4)
    plain = harness()
    want = [plain.submit(p, max_tokens=30).ids for p in prompts]
    engine = harness(draft=drafts["useless"], fixed=3)
    model = engine.speculator._proposer._model
    forward, calls = model.forward, []

    def fail(tokens, step):
        calls.append(tokens)
        if len(calls) > 12:
            raise RuntimeError("the draft is gone")
        return forward(tokens, step)

    monkeypatch.setattr(model, "forward", fail)
    answers = engine.together(prompts, max_tokens=30)
    assert [a.ids for a in answers] == want
    assert sum(a.end.timings.drafted for a in answers) > 0
    assert caplog.text.count("going on without it") == 1
    assert [engine.submit(p, max_tokens=30).ids for p in prompts] == want
    assert len(calls) == 13


def test_the_budget_holds_with_a_draft_models_cache(harness, drafts):
    room = harness().runner.arena.bytes_for(3, 512)
    engine = harness(room=room, draft=drafts["useless"], fixed=4)
    draft = engine.speculator._proposer
    engine.engine.call(lambda runner: setattr(runner, "beside", draft.bytes_for))
    used, step = [], engine.engine._step

    def watched():
        step()
        held = engine.runner.arena.nbytes + draft._arena.nbytes
        used.append((held + engine.runner.tree.nbytes, draft._arena.nbytes))

    engine.engine._step = watched
    for answer in engine.together([sequence(i, 40 + 45 * i) for i in range(6)], max_tokens=30):
        assert len(answer.ids) == 30
    assert max(total for total, _ in used) <= room
    assert max(drafts for _, drafts in used) > 0


def test_a_draft_reads_prompts_chunk_by_chunk_and_keeps_its_rows(tiny):
    draft = DraftModel(load_decoder(tiny("llama"), 4096, "float32"), 96, chunk=64)

    def make(length):
        request = Request(id="a", prompt=tuple(sequence(1, length)), params=SamplingParams())
        return Sequence(request, lambda event: None, 100, 0, answer=[7])

    first, second = make(150), make(20)
    found = [draft.propose([(first, 2), (second, 2)]) for _ in range(3)]
    assert [f is None for f in found] == [True, True, False]  # 64, 64, and 22 together with 20
    assert (found[2].tokens.shape, found[2].counts) == ((2, 2), [2, 2])
    second.answer += sequence(2, 40)
    assert draft.propose([(first, 2), (second, 0)]).counts == [2, 0]  # it sleeps, and reads on
    assert draft.propose([(first, 0), (second, 2)]).counts == [0, 2]


def test_a_recurrent_draft_is_refused(tiny):
    with pytest.raises(InvalidRequest, match="recurrent model cannot be a draft"):
        DraftModel(load_decoder(tiny("lfm2"), 512, "float32"), 96)


def test_lookup_finds_what_followed_before():
    request = Request(id="a", prompt=(1, 2, 3, 4, 5, 9, 2, 3, 4), params=SamplingParams())
    s = Sequence(request, lambda event: None, 100, 0)
    lookup = Lookup()
    assert lookup.follow(s, 3) == (5, 9, 2)
    s.answer.append(7)
    assert lookup.follow(s, 3) == ()
    s.answer.extend([5, 9])  # the pair came before, the triple did not
    assert lookup.follow(s, 2) == (2, 3)


# --- distributions: 8 tokens, every setting of the sampler, against the exact probabilities ---

VOCAB = 8
TARGET = np.array([1.2, 0.9, 0.4, 0.1, -0.3, -0.8, -1.5, -2.0], np.float32)
PROPOSAL = np.array([-0.5, 1.5, 0.3, -0.2, 0.9, -1.0, 0.0, -0.7], np.float32)
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"logit_bias": {2: 1.5, 0: -1.0}},
    {"xtc_probability": 1.0, "xtc_threshold": 0.15},
]
PROMPT, ANSWER = (1, 4), (3, 1)


def exact(params, logits):
    """The distribution that plain sampling draws from."""
    row = Row(params, 0, PROMPT, ANSWER, len(ANSWER))
    sampler = Sampler([params])
    kept = sampler._filtered(sampler._changed(mx.array(logits)[None], [row]), [row])
    return np.array(mx.softmax(kept, axis=-1))[0].astype(np.float64)


def first_tokens(params, count, proposal, accept_all=False):
    """What comes first out of ``count`` verified drafts of one token."""
    sampler = Sampler([params] * count)
    rows = [
        [Row(params, b, PROMPT, ANSWER, 2), Row(params, b, PROMPT, ANSWER, 3)] for b in range(count)
    ]
    if proposal is None:  # a lookup: always token 2
        tokens, logits = mx.full((count,), 2, dtype=mx.int32), None
    else:
        flat = [each[0] for each in rows]
        tokens, logits = sampler.propose(mx.array(np.tile(proposal, (count, 1))), flat)
    draft = Draft(tokens[:, None], [1] * count, None if logits is None else logits[:, None])
    target = mx.array(np.tile(TARGET, (count, 2, 1)))
    accepted, sampled = sampler.verify(target, draft, rows)
    first = np.array(sampled.tokens).reshape(count, 2)[:, 0]
    accepted = np.array(accepted)
    return np.where(accept_all, np.array(tokens), first), accepted


def chi_square(tokens, probs):
    observed = np.bincount(tokens, minlength=VOCAB)
    live = probs > 0
    assert observed[~live].sum() == 0, "a token that cannot be drawn was"
    expected = probs[live] * len(tokens)
    degrees = live.sum() - 1
    # Wilson and Hilferty's approximation of the 0.9999 quantile
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * np.sqrt(2 / (9 * degrees))) ** 3
    return ((observed[live] - expected) ** 2 / expected).sum(), limit


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("proposal", [PROPOSAL, None], ids=["draft", "lookup"])
def test_the_distribution_is_the_targets(options, proposal):
    params = SamplingParams(**{"temperature": 1.0, "min_p": 0.0, **options})
    tokens, accepted = first_tokens(params, 100_000, proposal)
    p = exact(params, TARGET)
    statistic, limit = chi_square(tokens, p)
    assert statistic < limit
    q = np.eye(VOCAB)[2] if proposal is None else exact(params, proposal)
    rate = np.minimum(p, q).sum()
    assert abs(accepted.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 100_000) + 1e-6


def test_a_broken_accept_rule_fails_the_same_test():
    params = SamplingParams(temperature=1.0, min_p=0.0)
    tokens, _ = first_tokens(params, 100_000, PROPOSAL, accept_all=True)
    statistic, limit = chi_square(tokens, exact(params, TARGET))
    assert statistic > limit


@pytest.mark.parametrize("draft", ["useless", "lookup"])
def test_sampling_with_a_draft_has_the_models_own_distribution(harness, drafts, draft):
    # The second token of many answers, batched, through the whole engine; 96 tokens in 6 classes.
    prompt = sequence(9, 4) * 3
    count, options = 600, {"temperature": 1.0, "min_p": 0.0, "max_tokens": 4}

    def classes(engine):
        answers = [engine.submit(prompt, seed=i, **options) for i in range(count)]
        return np.bincount([a.ids[2] % 6 for a in answers], minlength=6)

    plain, drafted = classes(harness()), classes(harness(draft=drafts[draft], fixed=3))
    statistic = ((plain - drafted) ** 2 / (plain + drafted)).sum()
    assert statistic < 25.7  # the 0.9999 quantile at 5 degrees of freedom


def test_the_pace_follows_what_is_measured():
    costs = Costs()
    for _ in range(5):
        costs.observe(1, 0, 1.0)
        costs.observe(1, 4, 2.0)
    good, bad = Pace(costs), Pace(costs)
    for _ in range(20):
        good.observe(4, 4)
        bad.observe(4, 0)
    assert [good.length(1), bad.length(1)] == [2, 2]  # the first is a try
    assert good.length(1) == MOST
    assert good.gain > 2
    assert bad.length(1) == 0
    assert not bad.awake


def test_a_useless_draft_sleeps_longer_and_longer():
    costs = Costs()
    costs.observe(1, 0, 1.0)
    costs.observe(1, 2, 2.0)
    pace = Pace(costs)
    tries, plain = 0, 0
    for _ in range(2000):
        length = pace.length(1) if pace.awake else 0
        if length:
            tries += 1
            pace.observe(length, 0)
        else:
            plain += 1
            pace.rest()
    assert tries < 0.02 * plain


def test_what_a_try_lost_is_paid_for_before_the_next():
    costs = Costs()
    costs.observe(1, 0, 1.0)
    assert costs.steps(1, 2, 9.0) == 1  # the first of its kind says nothing
    costs.observe(1, 2, 9.0)
    pace, sleeps = Pace(costs), []
    for _ in range(3):
        pace.observe(pace.length(1), 1, costs.steps(1, 2, 5.0))  # lost: 5 - 1 - 1
        assert pace.length(1) == 0
        sleeps.append(0)
        while not pace.awake:
            pace.rest()
            sleeps[-1] += 1
    assert sleeps == [600, 600, 600]


def test_a_fixed_length_is_kept():
    pace = Pace(Costs(), fixed=5)
    for _ in range(50):
        pace.observe(5, 0)
    assert pace.length(1) == 5
