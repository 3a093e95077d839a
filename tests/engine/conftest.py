"""An engine over tiny random models, with events collected by request."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from rl_mlx.cache.governor import Governor
from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.loop import Engine
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.engine.speculate import Speculator
from rl_mlx.model.load import load_decoder
from rl_mlx.settings import KVFormat
from rl_mlx.types import Failed, Finished, Request, SamplingParams, Token


class SimulatedDevice:
    """A device of so many bytes, which remembers the limits it was given."""

    def __init__(self, capacity):
        self.limits = (0, 0)
        self._capacity = capacity

    def capacity(self):
        return self._capacity

    def share(self):
        return 1.0

    def set_limits(self, wired, cached):
        before, self.limits = self.limits, (wired, cached)
        return before


@dataclass
class Answer:
    """What came of one request."""

    events: list = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def emit(self, event):
        assert not self.ended.is_set(), "an event after the terminal one"
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60), "the request never ended"
        return self

    @property
    def ids(self):
        return [e.id for e in self.wait().events if isinstance(e, Token)]

    @property
    def end(self):
        return self.wait().events[-1]


class Harness:
    """``submit`` requests; ``runner`` and ``scheduler`` are there to be looked at."""

    def __init__(
        self,
        decoder,
        *,
        rows=32,
        chunk=64,
        room=1 << 30,
        kv=None,
        queue=2000,
        draft=None,
        fixed=None,
        chunks=None,
        runs_ahead=None,
    ):
        self.governor = Governor(SimulatedDevice(room), room, weights=0)

        def start():  # arrays belong to the thread that makes them
            self.runner = Runner(decoder, self.governor, chunk, kv or KVFormat())
            if runs_ahead is not None:  # as a GPU does, or as a CPU does
                self.runner.runs_ahead = runs_ahead
            proposer = draft and draft(decoder)
            self.speculator = Speculator(proposer, fixed)
            return self.runner, self.scheduler, self.speculator

        self.scheduler = Scheduler(
            max_rows=rows,
            admit=lambda s: self.runner.admits(s),
            chunks=chunks or ChunkSize(chunk),
            packs=decoder.packs,
        )
        self.engine = Engine(start, queue)
        self._count = 0

    def submit(self, prompt, *, eos=(), priority=0, **params):
        self._count += 1
        answer = Answer()
        options = SamplingParams(**{"temperature": 0, "max_tokens": 16, **params})
        request = Request(
            id=str(self._count), prompt=tuple(prompt), params=options,
            eos_ids=frozenset(eos), priority=priority,
        )  # fmt: skip
        limit = 10_000 if options.max_tokens is None else options.max_tokens
        answer.id = request.id
        self.engine.submit(Sequence(request, answer.emit, limit, options.seed or 0))
        return answer

    def together(self, prompts, **params):
        """All at once: none is looked at before the last one has been queued."""
        gate = threading.Event()
        caller = threading.Thread(target=lambda: self.engine.call(lambda _: gate.wait(30)))
        caller.start()
        try:
            return [self.submit(p, **params) for p in prompts]
        finally:
            gate.set()
            caller.join()


@pytest.fixture
def harness(tiny):
    """``harness(family, **options)``: a running engine, closed at the end."""
    made = []

    def make(family="llama", **options):
        config = {"head_dim": 32} if options.get("kv") else {}
        made.append(Harness(load_decoder(tiny(family, **config), 4096, "float32"), **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()
