"""Speculative decoding: what is accepted, against theory and mlx-lm, and what it costs.

    python benchmarks/speculate.py demo.gguf draft.gguf --pairs 5 --only acceptance useless

mlx-lm gets both models as folders that ``rl_mlx.convert`` makes of them in a temporary place; both
sides compute in float32. Acceptance is per draft token that was looked at.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
from _paired import in_turns, load_mlx_lm, median, parser, ratios, run_parts

from rl_mlx import LLM
from rl_mlx.cache.governor import Governor, MLXDevice
from rl_mlx.convert import convert
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.demo.grammar import lists, plain_texts
from rl_mlx.demo.tasks import Exercises
from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.loop import Engine
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.engine.speculate import Lookup, Speculator
from rl_mlx.sample.sampler import Row, Sampler
from rl_mlx.sample.verify import Draft
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Event, Finished, Request, Result, SamplingParams, Timings

Prompts = Seq[list[int]]
EXACT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def synthetic(pairs: int = 5, draws: int = 50_000) -> dict[str, Any]:
    """Acceptance at temperature 1 against ``sum(min(p, q))``, for pairs of random logits."""
    vocab, batch = 64, 500
    params = SamplingParams(**EXACT)
    found = {}
    for pair in range(pairs):
        keys = mx.random.split(mx.random.key(pair), 2)
        p, q = (mx.random.normal((vocab,), key=key) * (1 + pair / 2) for key in keys)
        want = float(mx.minimum(mx.softmax(p), mx.softmax(q)).sum())
        matching = float((mx.softmax(p) * mx.softmax(q)).sum())
        sampler, accepted = Sampler([params] * batch), 0
        for start in range(0, draws, batch):
            rows = [
                [Row(params, pair * draws + start + b, (1,), (), at) for at in (0, 1)]
                for b in range(batch)
            ]
            logits = mx.broadcast_to(q, (batch, vocab))
            tokens, kept = sampler.propose(logits, [each[0] for each in rows])
            draft = Draft(tokens[:, None], [1] * batch, kept[:, None])
            target = mx.broadcast_to(p, (batch, 2, vocab))
            accepted += int(sampler.verify(target, draft, rows)[0].sum())
        error = (want * (1 - want) / draws) ** 0.5
        found[f"pair {pair}"] = {
            "sum(min(p, q))": round(want, 4),
            "accepted": round(accepted / draws, 4),
            "sum(p * q), of sample-and-match": round(matching, 4),
            "standard errors off": round((accepted / draws - want) / error, 2),
        }
    return found


def prompt_sets(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Prompts by what comes after them: answers that are nearly certain, or what is open."""
    random, exercises = Random(0), Exercises()
    asked = [exercises.exercise(random)[0] for _ in range(12)]
    heroes = ("a fox", "a bear", "a frog", "a cat", "a dog", "a bird")
    asked += [f"tell me a story about {hero}" for hero in heroes]
    turns = [tokenizer.template.render([{"role": "user", "content": text}]) for text in asked]
    openings = [text.partition("{")[0].strip() for text in plain_texts("stories")]
    words = " ".join(lists("words")["words"]).split()
    return {
        "questions and stories": [tokenizer.encode(t, add_special=False) for t in turns],
        "texts that go on": [tokenizer.encode(t) for t in dict.fromkeys(openings) if t][:12],
        "lists of words": [
            tokenizer.encode(", ".join(random.sample(words, 3)) + ",") for _ in range(12)
        ],
    }


class Pair:
    """A target and its draft, on both sides."""

    def __init__(self, target: str, draft: str, pairs: int) -> None:
        self.target, self.draft, self.pairs = target, draft, pairs
        self._folder = tempfile.TemporaryDirectory()
        self.sets = prompt_sets(Tokenizer.from_gguf(target))
        self.prompts = self.sets["questions and stories"]

    @functools.cache  # noqa: B019  (the pair lives as long as the program)
    def ours(self, tokens: int | None, draft: str | None = "") -> LLM:
        """``tokens`` a draft, None for the pace's own; without a draft where it is None."""
        draft = self.draft if draft == "" else draft
        return LLM(self.target, backend="mlx", draft=draft, draft_tokens=tokens, dtype="float32")

    @functools.cached_property
    def theirs(self) -> tuple[Any, Any]:
        """mlx-lm's models."""
        made = []
        for name in (self.target, self.draft):
            folder = f"{self._folder.name}/{Path(name).stem}"
            convert(name, folder, scales="float32")
            made.append(load_mlx_lm(folder)[0])
        return made[0], made[1]

    def run_ours(
        self, llm: LLM, tokens: int, seed: int = 0, prompts: Prompts = (), **sampling: Any
    ) -> list[Result]:
        """One answer after the other."""
        return [
            llm.generate(p, max_tokens=tokens, seed=seed + i, **sampling)
            for i, p in enumerate(prompts or self.prompts)
        ]

    def run_theirs(
        self, draft: int, tokens: int, temperature: float, seed: int = 0, prompts: Prompts = ()
    ) -> tuple[int, int, int]:
        """Drafted and accepted tokens, and steps of the target."""
        from mlx_lm.generate import speculative_generate_step
        from mlx_lm.sample_utils import make_sampler

        eos = Tokenizer.from_gguf(self.target).eos_ids
        accepted = steps = 0
        for i, prompt in enumerate(prompts or self.prompts):
            mx.random.seed(seed + i)
            came = speculative_generate_step(
                mx.array(prompt), *self.theirs, num_draft_tokens=draft, max_tokens=tokens,
                sampler=make_sampler(temperature),
            )  # fmt: skip
            begins = True
            for token, _, is_drafted in came:
                steps += begins
                accepted += is_drafted
                begins = not is_drafted  # the target's own token ends a step
                if token in eos:
                    break
        return draft * steps, accepted, steps


def expected(pair: Pair, prompts: Prompts) -> dict[str, float]:
    """The two rules' acceptance along text that the target samples: no draws, no noise."""
    target, draft = pair.ours(None, None), LLM(pair.draft, backend="mlx", dtype="float32")
    exact, matching, entropy = [], [], []
    for i, prompt in enumerate(prompts):
        ids = target.generate(prompt, max_tokens=96, seed=i, **EXACT).token_ids
        if not ids:
            continue
        whole = [*prompt, *ids]
        logits = [mx.array(m.logits(whole)[len(prompt) - 1 : -1]) for m in (target, draft)]
        p, q = (mx.softmax(each, axis=-1) for each in logits)
        exact += np.array(mx.minimum(p, q).sum(axis=-1)).tolist()
        matching += np.array((p * q).sum(axis=-1)).tolist()
        entropy += np.array(-(p * mx.log(p + 1e-20)).sum(axis=-1)).tolist()
    draft.close()
    means = statistics.mean(exact), statistics.mean(matching)
    return {
        "sum(min(p, q))": round(means[0], 4),
        "sum(p * q)": round(means[1], 4),
        "ratio": round(means[0] / means[1], 3),
        "entropy, nats a token": round(statistics.mean(entropy), 3),
    }


def acceptance(pair: Pair) -> dict[str, Any]:
    """What can be had and what was, for each set of prompts."""
    return {name: acceptance_of(pair, prompts) for name, prompts in pair.sets.items()}


def acceptance_of(pair: Pair, prompts: Prompts) -> dict[str, Any]:
    """One draft token a step, against mlx-lm, at temperature 1 and greedy."""
    found: dict[str, Any] = {"expected at temperature 1": expected(pair, prompts)}
    for name, temperature, rounds in (("temperature 1", 1.0, pair.pairs), ("greedy", 0.0, 1)):
        sampling = {**EXACT, "temperature": temperature}
        mine, theirs = [0, 0], [0, 0]
        for seed in range(0, 1000 * rounds, 1000):
            results = pair.run_ours(pair.ours(1), 96, seed, prompts, **sampling)
            timings = [r.timings for r in results]
            mine[0] += sum(t.drafted for t in timings)
            mine[1] += sum(t.accepted for t in timings)
            drafted, accepted, _ = pair.run_theirs(1, 96, temperature, seed, prompts)
            theirs[0] += drafted
            theirs[1] += accepted
        rates = mine[1] / mine[0], theirs[1] / theirs[0]
        found[name] = {
            "rl-mlx": round(rates[0], 4),
            "mlx-lm": round(rates[1], 4),
            "ratio": round(rates[0] / rates[1], 3),
            "draft tokens": {"rl-mlx": mine[0], "mlx-lm": theirs[0]},
        }
    return found


def tokens_per_forward(pair: Pair) -> dict[str, Any]:
    """Greedy, four draft tokens a step; prompts are left out on both sides."""
    ours = pair.run_ours(pair.ours(4), 96, temperature=0)
    # The prompt's forward and the token it gives are left out; the end of the answer is a token.
    made = sum(r.timings.generated - 1 + (r.finish_reason == "stop") for r in ours)
    forwards = sum(r.timings.forwards - 1 for r in ours)
    _, accepted, steps = pair.run_theirs(4, 96, 0.0)
    return {
        "rl-mlx": round(made / forwards, 3),
        "mlx-lm": round((accepted + steps) / steps, 3),
        "tokens": made,
    }


class Scripted:
    """A target that knows its text by heart: after position p comes token p + 1 of it."""

    cache_specs = ()
    dtype = mx.float32

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self.text = mx.array([0])

    def forward(self, tokens: mx.array, step: Any) -> mx.array:
        """Positions ``[1, S, 1]``, which stand for hidden states."""
        return (step.offset + mx.arange(tokens.shape[1]))[None, :, None]

    def head(self, hidden: mx.array) -> mx.array:
        """All the weight on the token that comes next."""
        following = self.text[mx.minimum(hidden + 1, self.text.size - 1)]
        return (mx.arange(self._vocab) == following).astype(mx.float32) * 50


def copy_tasks() -> list[tuple[str, str]]:
    """Texts to repeat, to edit and lists to repeat, and the right answers."""
    random, tasks = Random(0), []
    stories = [t for t in plain_texts("stories") if len(t) > 200]
    for story in stories[:4]:
        names = {"{name}": "Emma", "{hero}": "a fox", "{friend}": "a bear", "{place}": "the river"}
        for word, value in {**names, "{thing}": "a lamp", "{short}": "the fox"}.items():
            story = story.replace(word, value)
        tasks.append((f"Repeat this text: {story}\n", story))
        tasks.append((f"Replace the by this in: {story}\n", story.replace(" the ", " this ")))
    for count in (10, 20, 40):
        items = ", ".join(random.sample(" ".join(lists("words")["words"]).split(), count))
        tasks.append((f"Repeat this list: {items}\n", items))
    return tasks


def lookup(pair: Pair) -> dict[str, Any]:
    """Tokens a forward on tasks of copying; the target makes no mistake in them."""
    tokenizer = Tokenizer.from_gguf(pair.target)
    model = Scripted(tokenizer.vocab_size)
    device = MLXDevice(1 << 30)
    count = itertools.count()

    def start(fixed: int) -> Any:
        runner = Runner(model, Governor(device, 1 << 30, 0))
        scheduler = Scheduler(max_rows=1, admit=runner.admits, chunks=ChunkSize())
        return runner, scheduler, Speculator(Lookup(), fixed)

    found = {}
    for fixed in (4, 8):
        engine = Engine(functools.partial(start, fixed))
        made = forwards = 0
        for question, answer in copy_tasks():
            prompt, text = tokenizer.encode(question), tokenizer.encode(answer)
            model.text = mx.array([*prompt, *text, 0])
            mx.eval(model.text)
            ended = threading.Event()
            timings: list[Timings] = []

            def emit(
                event: Event, ended: threading.Event = ended, into: list[Timings] = timings
            ) -> None:
                if isinstance(event, Finished):
                    into.append(event.timings)
                    ended.set()

            params = SamplingParams(temperature=0, max_tokens=len(text), ignore_eos=True)
            request = Request(id=f"r{next(count)}", prompt=tuple(prompt), params=params)
            engine.submit(Sequence(request, emit, len(text), 0))
            ended.wait()
            made += timings[0].generated - 1
            forwards += timings[0].forwards - 1
        engine.close()
        found[f"{fixed} a step"] = {"tokens": made, "tokens a forward": round(made / forwards, 3)}
    return found


def shuffled(path: str, target: Path) -> str:
    """A draft of no use: the weights of ``path``, the quantized blocks of each tensor shuffled."""
    shutil.copy(path, target)
    rng = np.random.default_rng(0)
    data = np.memmap(target, np.uint8, "r+")
    with GGUFFile.open(path) as file:
        for tensor in file.tensors.values():
            if len(tensor.shape) < 2:
                continue
            size = tensor.type.block_bytes
            blocks = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(-1, size)
            blocks[:] = blocks[rng.permutation(len(blocks))]
    data.flush()
    return str(target)


def against_plain(pair: Pair, draft: str, pairs: int) -> dict[str, Any]:
    """Tokens a second of one stream, with a draft at its own pace against without.

    CPU time says most where other programs take part of the machine.
    """

    def run(llm: LLM, turn: int) -> tuple[float, float]:
        prompt = pair.prompts[turn % len(pair.prompts)]
        began, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompt, max_tokens=256, temperature=0, ignore_eos=True)
        return 256 / (time.perf_counter() - began), 256 / (time.process_time() - cpu)

    sides = {
        "with": functools.partial(run, pair.ours(None, draft)),
        "without": functools.partial(run, pair.ours(None, None)),
    }
    found = in_turns(sides, pairs)
    wall, cpu = ({n: [r[i] for r in each] for n, each in found.items()} for i in (0, 1))
    return {
        "tokens per second": {name: median(each, 1) for name, each in wall.items()},
        "ratio": ratios(wall["with"], wall["without"]),
        "ratio by CPU time": ratios(cpu["with"], cpu["without"]),
    }


def parts(pair: Pair, folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All that can be measured, by name."""
    yield "synthetic", synthetic
    yield "acceptance", lambda: acceptance(pair)
    yield "tokens_per_forward", lambda: tokens_per_forward(pair)
    yield "lookup", lambda: lookup(pair)
    yield (
        "useless",
        lambda: against_plain(pair, shuffled(pair.draft, folder / "useless.gguf"), pair.pairs),
    )
    yield "gain", lambda: against_plain(pair, pair.draft, pair.pairs)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("target", help="a GGUF file with a chat template")
    options.add_argument("draft", help="a smaller model of the same vocabulary")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(args.target, args.draft, args.pairs)
        run_parts(dict(parts(pair, Path(folder))), args)


if __name__ == "__main__":
    main()
