"""Train the demo model and its draft model: ``python -m rl_mlx.demo.train``.

The target learns the answers of the corpus; the draft learns the target's own guesses
(distillation, Hinton et al. 2015, arXiv:1503.02531). An interrupted run goes on from its last
checkpoint when it is started again with the same options.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import Tokenizer

from rl_mlx.demo import vocab
from rl_mlx.demo.corpus import Corpus
from rl_mlx.demo.data import batches
from rl_mlx.demo.export import export
from rl_mlx.demo.network import Shape, Weights, forward, initial

TARGET = Shape(vocab=vocab.SIZE, hidden=256, layers=4, heads=8, kv_heads=4, feed_forward=768)
DRAFT = Shape(vocab=vocab.SIZE, hidden=128, layers=2, heads=4, kv_heads=2, feed_forward=384)

Loss = Callable[[Weights, mx.array, mx.array], mx.array]


def answer_loss(shape: Shape) -> Loss:
    """Cross entropy of the next token, weighted."""

    def loss(weights: Weights, ids: mx.array, share: mx.array) -> mx.array:
        logits = forward(weights, shape, ids[:, :-1])
        right = mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        return ((mx.logsumexp(logits, -1) - right) * share).sum() / share.sum()

    return loss


def draft_loss(shape: Shape, teacher: Weights, teacher_shape: Shape) -> Loss:
    """Cross entropy of the draft's distribution against the target's, weighted."""

    def loss(weights: Weights, ids: mx.array, share: mx.array) -> mx.array:
        inputs = ids[:, :-1]
        wanted = mx.stop_gradient(mx.softmax(forward(teacher, teacher_shape, inputs), -1))
        logits = forward(weights, shape, inputs)
        costs = mx.logsumexp(logits, -1) - (wanted * logits).sum(-1)
        return (costs * share).sum() / share.sum()

    return loss


class Training:
    """Weights, optimizer and data of one network, with checkpoints in a folder."""

    def __init__(
        self, name: str, shape: Shape, loss: Loss, tokenizer: Tokenizer, args: argparse.Namespace
    ) -> None:
        self._name, self._steps = name, args.steps
        self.weights = initial(shape, args.seed)
        # The rate stays high and falls only at the end, so a run can be made longer until then.
        warmup, falling = max(1, args.steps // 50), max(1, args.steps * 2 // 5)
        rise = optim.linear_schedule(0.0, args.rate, warmup)
        high = optim.linear_schedule(args.rate, args.rate, 1)
        fall = optim.linear_schedule(args.rate, args.rate * 0.01, falling)
        rate = optim.join_schedules([rise, high, fall], [warmup, args.steps - falling])
        self.optimizer = optim.AdamW(rate, betas=[0.9, 0.98], weight_decay=0.05)
        self.optimizer.init(self.weights)
        self._checkpoint = args.out / f"{name}.safetensors"
        self._batches = batches(tokenizer, args.seed, args.tokens)
        self._loss = loss
        self._done = 0
        self._restore()

    def run(self) -> Weights:
        """Train to the last step; returns the weights."""
        gradient = mx.value_and_grad(self._loss)
        start, seen, losses = time.perf_counter(), 0, deque[float](maxlen=50)
        for ids, share in itertools.islice(self._batches, self._done, self._steps):
            loss, grads = gradient(self.weights, ids, share)
            grads, _ = optim.clip_grad_norm(grads, 1.0)  # type: ignore[no-untyped-call]
            self.weights.update(self.optimizer.apply_gradients(grads, self.weights))
            mx.eval(loss, self.weights, self.optimizer.state)
            self._done += 1
            seen += ids.size
            losses.append(cast(float, loss.item()))
            last = self._done == self._steps
            if last or self._done % 50 == 0:
                speed = seen / (time.perf_counter() - start)
                print(
                    f"{self._name} step {self._done}/{self._steps} loss {mean(losses):.4f} "
                    f"tokens {seen} ({speed:.0f}/s)",
                    flush=True,
                )
            if last or self._done % 200 == 0:
                self._save()
        return self.weights

    def _save(self) -> None:
        state = {"weights": self.weights, "optimizer": self.optimizer.state}
        arrays = dict(tree_flatten(state))
        partial = self._checkpoint.with_suffix(".partial.safetensors")
        mx.save_safetensors(str(partial), arrays, {"done": str(self._done)})
        partial.replace(self._checkpoint)

    def _restore(self) -> None:
        """Weights, optimizer state and place in the data of the last checkpoint, if any."""
        if not self._checkpoint.exists():
            return
        arrays, metadata = cast(
            "tuple[Weights, dict[str, str]]", mx.load(str(self._checkpoint), return_metadata=True)
        )
        kept = {name: array for name, array in arrays.items() if name.startswith("weights.")}
        self.weights.update({name.removeprefix("weights."): array for name, array in kept.items()})
        self.optimizer.state = tree_unflatten(
            [
                (name.removeprefix("optimizer."), array)
                for name, array in arrays.items()
                if name not in kept
            ]
        )
        self._done = int(metadata["done"])


def make_tokenizer(out: Path, seed: int) -> Tokenizer:
    """The tokenizer of the run in ``out``; trained on a sample of the corpus if it has none."""
    path = out / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    sample = itertools.islice(Corpus().conversations(seed), 20000)
    tokenizer = vocab.train(text for c in sample for text, _ in vocab.segments(c))
    tokenizer.save(str(path))
    return tokenizer


def main() -> None:
    """Train both networks and write ``demo.gguf`` and ``draft.gguf``."""
    parser = argparse.ArgumentParser(prog="python -m rl_mlx.demo.train", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=6500, help="steps of the target")
    parser.add_argument("--draft-steps", type=int, default=2000, help="steps of the draft")
    parser.add_argument("--tokens", type=int, default=640, help="tokens in a batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.out, args.seed)
    target = Training("demo", TARGET, answer_loss(TARGET), tokenizer, args).run()
    export(
        args.out / "demo.gguf", target, TARGET, tokenizer, "rl-mlx demo",
        "A small chat model that shows rl-mlx at work. For a real model, run rl-mlx pull.",
    )  # fmt: skip
    args.steps, args.seed = args.draft_steps, args.seed + 1
    draft = Training("draft", DRAFT, draft_loss(DRAFT, target, TARGET), tokenizer, args).run()
    export(
        args.out / "draft.gguf", draft, DRAFT, tokenizer, "rl-mlx demo draft",
        "The draft model of the rl-mlx demo, for speculative decoding.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
