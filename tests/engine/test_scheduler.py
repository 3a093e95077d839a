"""The scheduler, driven by a state machine: every request ends once, and no row is left behind."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.types import Failed, Finished, Request, SamplingParams

CHUNK, ROWS = 4, 3


def make(name, prompt=6, limit=3, priority=0, events=None):
    events = [] if events is None else events
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    request = Request(id=name, prompt=tokens, params=SamplingParams(), priority=priority)
    return Sequence(request, events.append, limit, seed=0), events


def make_scheduler(rows, admit=lambda s: True, *, packs=False, most=CHUNK):
    chunks = ChunkSize(most)
    for power in range(6):
        chunks.decoded(1 << power, 1.0)
    return Scheduler(max_rows=rows, admit=admit, chunks=chunks, packs=packs)


class Machine(RuleBasedStateMachine):
    """Plays the loop: plans, pretends to run, reads one step late as the real one does."""

    packs = False

    def __init__(self):
        super().__init__()
        self.memory = True
        self.scheduler = make_scheduler(ROWS, lambda s: self.memory, packs=self.packs)
        self.all = []
        self.pending = ()
        self.steps_since_decode = 0

    @rule(prompt=st.integers(1, 12), limit=st.integers(1, 5), priority=st.integers(0, 2))
    def submit(self, prompt, limit, priority):
        sequence, events = make(str(len(self.all)), prompt, limit, priority)
        self.scheduler.add(sequence)
        self.all.append((sequence, events))

    @rule(data=st.data())
    @precondition(lambda self: self.all)
    def cancel(self, data):
        sequence, _ = data.draw(st.sampled_from(self.all))
        sequence.finish("cancelled")
        self.forget(sequence)

    @rule(token=st.integers(0, 50))
    def preempt(self, token):
        self.collect(token)
        victim = self.scheduler.victim()
        active = self.rows()
        assert (victim is None) == (len(active) < 2)
        if victim is not None:
            urgency = [(s.request.priority, -s.submitted) for s in active]
            assert (victim.request.priority, -victim.submitted) == min(urgency)
            self.scheduler.preempt(victim)
            victim.row, victim.cached = None, 0

    @rule()
    def toggle_memory(self):
        self.memory = not self.memory

    @rule(token=st.integers(0, 50), drafts=st.booleans())
    def step(self, token, drafts):
        while (sequence := self.scheduler.entering()) is not None:
            assert len(self.rows()) < ROWS
            used = {s.row for s in self.rows()}
            sequence.row = next(row for row in range(ROWS) if row not in used)
        waiting_streams = [s for s in self.scheduler.running if not s.saturated]
        together = self.packs and not drafts
        work = self.scheduler.plan(together=together)
        if work is None:
            self.collect(token)
            return
        if work.batch and self.pending and self.pending != work.batch:
            self.collect(token)
            return  # planned again
        self.steps_since_decode = 0 if work.batch else self.steps_since_decode + 1
        if waiting_streams:
            assert self.steps_since_decode < 2, "a stream waited longer than one chunk"
        assert not work.batch or set(work.batch) == set(waiting_streams)
        assert together or not (work.batch and work.reads)
        assert self.packs or len(work.reads) < 2
        room = CHUNK
        for read in work.reads:
            assert 0 < read.tokens <= room
            room -= min(read.sequence.unread, read.tokens)
            read.sequence.cached += min(read.sequence.unread, read.tokens)
        assert all(r.sequence.prefilled for r in work.reads[:-1])
        self.scheduler.started(work)
        self.collect(token)
        new = [r.sequence for r in work.reads if r.sequence.prefilled]
        assert all(s.is_running for s in new)
        self.pending = (*work.batch, *new)
        for sequence in self.pending:
            sequence.in_flight += 1

    def rows(self):
        return [s for s in self.scheduler.everything() if s.row is not None]

    def collect(self, token):
        pending, self.pending = self.pending, ()
        for sequence in pending:
            sequence.in_flight -= 1
            self.take(sequence, token)

    def take(self, sequence, token):
        sequence.take(token, None)
        if sequence.done:
            self.forget(sequence)

    def forget(self, sequence):
        self.scheduler.remove(sequence)
        sequence.row = None

    @invariant()
    def one_terminal_event(self):
        for sequence, events in self.all:
            ends = [e for e in events if isinstance(e, Finished | Failed)]
            assert len(ends) == sequence.done
            assert not ends or events[-1] is ends[0]
            assert len(sequence.answer) <= sequence.limit

    @invariant()
    def nothing_leaks(self):
        places = self.scheduler.everything()
        assert len(places) == len(set(places))
        assert not any(s.done for s in places)
        assert {s for s, _ in self.all if not s.done} == set(places)

    def teardown(self):
        self.memory = True
        for _ in range(2000):
            if self.scheduler.idle and not self.pending:
                break
            self.step(token=1, drafts=False)
        assert all(sequence.done for sequence, _ in self.all), "a request never ended"


class PackingMachine(Machine):
    """The same where prompts are read together, and beside the streams."""

    packs = True


TestMachine = Machine.TestCase
TestPackingMachine = PackingMachine.TestCase
for case in (TestMachine, TestPackingMachine):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_higher_priority_goes_first_and_equals_in_order():
    scheduler = make_scheduler(1)
    for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", 1)]:
        scheduler.add(make(name, priority=priority)[0])
    assert [s.request.id for s in scheduler.waiting] == ["b", "d", "a", "c"]


def run(scheduler):
    """Everything that is waiting and may enter is read to its end; who that was."""
    entered = []
    while (sequence := scheduler.entering()) is not None:
        sequence.row = len(scheduler.running) + len(entered)
        entered.append(sequence)
    while scheduler.reading:
        work = scheduler.plan(together=True)
        for read in work.reads:
            read.sequence.cached += min(read.tokens, read.sequence.unread)
        scheduler.started(work)
    return entered


def test_who_gave_way_goes_on_before_those_who_came_later():
    scheduler = make_scheduler(2)
    first, second, third = (make(name)[0] for name in "abc")
    for sequence in (first, second):
        scheduler.add(sequence)
        assert run(scheduler) == [sequence]
    scheduler.add(third)
    scheduler.preempt(scheduler.victim())
    assert [s.request.id for s in scheduler.waiting] == ["b", "c"]
    assert not second.is_running


def test_short_prompts_are_read_together_as_far_as_a_chunk_goes():
    scheduler = make_scheduler(8, packs=True, most=100)
    for name in range(4):
        scheduler.add(make(str(name), [name] * 40)[0])
    assert len(run(scheduler)) == 3  # the third one in part
    assert len(run(scheduler)) == 1


def test_who_shares_a_beginning_waits_until_it_is_read():
    scheduler = make_scheduler(8, packs=True, most=512)
    start = list(range(60))
    same, nearly, other = (
        make(str(n), prompt)[0]
        for n, prompt in enumerate(([*start, 1], [*start[:15], 99], [*start, 2]))
    )
    for sequence in (same, nearly, other):
        scheduler.add(sequence)
    assert run(scheduler) == [same, nearly]
    other.cached = 60  # the prefix tree has it now
    assert run(scheduler) == [other]
