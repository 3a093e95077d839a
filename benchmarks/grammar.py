"""Structured output: seconds to prepare a vocabulary, to compile, and milliseconds a mask.

    python benchmarks/grammar.py VOCAB.gguf [VOCAB.gguf ...] [--answers N] [--json]

Answers are drawn with random logits, so that the masks are of every part of the grammar.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from rl_mlx.sample.adjust import allowed_tokens
from rl_mlx.sample.grammar import Compiler, Constraint
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 200}, "maxItems": 3},
    },
    "required": ["name", "age", "tags", "notes"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar("json_schema", json.dumps(PERSON)),
    "json_object": Grammar("json_object"),
    "regex": Grammar("regex", r"[A-Z][a-z]+( [a-z]+){5,20}\."),
    "gbnf": Grammar("gbnf", 'root ::= num (" " [-+*] " " num){3,20}\nnum ::= [1-9] [0-9]{0,5}'),
}
MAX_TOKENS = 200


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vocab", nargs="+", type=Path)
    parser.add_argument("--answers", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for path in options.vocab for row in measure(path, options.answers)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def measure(path: Path, answers: int) -> list[dict[str, object]]:
    """One row a grammar, over one vocabulary."""
    tokenizer = Tokenizer.open(path)
    compiler = Compiler(tokenizer)
    start = time.perf_counter()
    compiler.compile(Grammar("regex", "a"))
    prepared = time.perf_counter() - start
    rows: list[dict[str, object]] = []
    for name, grammar in GRAMMARS.items():
        start = time.perf_counter()
        constraint = compiler.compile(grammar)
        compiled = time.perf_counter() - start
        times = [t for seed in range(answers) for t in masks(constraint, compiler, tokenizer, seed)]
        rows.append(
            {
                "vocab": path.stem,
                "tokens": tokenizer.vocab_size,
                "prepare_s": round(prepared, 3),
                "grammar": name,
                "compile_ms": round(compiled * 1e3, 2),
                "mask_ms": round(median(times) * 1e3, 3),
                "p99_ms": round(float(np.quantile(times, 0.99)) * 1e3, 3),
                "masks": len(times),
            }
        )
    return rows


def masks(
    constraint: Constraint, compiler: Compiler, tokenizer: Tokenizer, seed: int
) -> list[float]:
    """Seconds of each step of one answer: the mask, and the token that is taken."""
    rng = np.random.default_rng(seed)
    matcher = constraint.start()
    times: list[float] = []
    while not matcher.done and len(times) < MAX_TOKENS:
        start = time.perf_counter()
        mask = matcher.mask()
        spent = time.perf_counter() - start
        ids = np.flatnonzero(allowed_tokens(mask, compiler.vocab_size))
        token = int(rng.choice(ids))
        start = time.perf_counter()
        matcher.advance(token)
        times.append(spent + time.perf_counter() - start)
        if token in tokenizer.eos_ids:
            break
    return times


if __name__ == "__main__":
    main()
