"""The scheduler, driven by a state machine: every request ends once, and no row is left behind."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.scheduler import Decode, Prefill, Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.types import Failed, Finished, Request, SamplingParams

CHUNK, ROWS = 4, 3


def make(name, prompt=6, limit=3, priority=0, events=None):
    events = [] if events is None else events
    request = Request(
        id=name, prompt=tuple(range(prompt)), params=SamplingParams(), priority=priority
    )
    return Sequence(request, events.append, limit, seed=0), events


def make_scheduler(rows, admit=lambda s: True):
    return Scheduler(max_rows=rows, admit=admit, chunks=ChunkSize(CHUNK))


class Machine(RuleBasedStateMachine):
    """Plays the loop: plans, pretends to run, reads one step late as the real one does."""

    def __init__(self):
        super().__init__()
        self.memory = True
        self.scheduler = make_scheduler(ROWS, lambda s: self.memory)
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

    @rule(token=st.integers(0, 50))
    def step(self, token):
        waiting_streams = [s for s in self.scheduler.running if not s.saturated]
        work = self.scheduler.plan()
        if isinstance(work, Prefill):
            assert work.sequence.row is not None or len(self.rows()) < ROWS
            work.sequence.row = 0 if work.sequence.row is None else work.sequence.row
            work.sequence.cached = min(work.sequence.cached + work.tokens, work.sequence.known)
            self.steps_since_decode += 1
            if waiting_streams:
                assert self.steps_since_decode == 1, "a stream waited longer than one chunk"
            self.collect(token)
            if work.sequence.prefilled:
                self.scheduler.prefilled()
                self.take(work.sequence, token)
        elif isinstance(work, Decode):
            self.steps_since_decode = 0
            assert set(work.batch) == set(waiting_streams)
            for sequence in work.batch:
                sequence.in_flight += 1
            self.collect(token)
            self.pending = work.batch
        else:
            self.collect(token)

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
            self.step(token=1)
        assert all(sequence.done for sequence, _ in self.all), "a request never ended"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_higher_priority_goes_first_and_equals_in_order():
    scheduler = make_scheduler(1)
    for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", 1)]:
        scheduler.add(make(name, priority=priority)[0])
    assert [s.request.id for s in scheduler.waiting] == ["b", "d", "a", "c"]


def test_who_gave_way_goes_on_before_those_who_came_later():
    scheduler = make_scheduler(2)
    first, second, third = (make(name)[0] for name in "abc")
    for sequence in (first, second):
        scheduler.add(sequence)
        assert scheduler.plan().sequence is sequence
        scheduler.prefilled()
        scheduler.plan()
    scheduler.add(third)
    scheduler.preempt(scheduler.victim())
    assert [s.request.id for s in scheduler.waiting] == ["b", "c"]
    assert not second.is_running
