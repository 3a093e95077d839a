"""Sensitivities, the knapsack over them, and that what it chooses is better than uniform bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx import LLM
from rl_mlx.convert import convert, inspect
from rl_mlx.convert.recipe import KEEP
from rl_mlx.errors import InvalidRequest
from rl_mlx.lab import allocate, demo_text, divergence, sensitivity, tensor_errors
from rl_mlx.lab.search import Allocation
from rl_mlx.lab.sensitivity import Cost, Sensitivity

QUANTS = ("q3", "q4", "q6")


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return sensitivity("demo", demo_text(), quants=QUANTS, window=32)


def costs(rows) -> Sensitivity:
    """Tensors of one byte a weight and more."""
    made = [
        Cost(f"t{i}", i, "r", 10, f"q{j}", size, kl, 0.0)
        for i, row in enumerate(rows)
        for j, (size, kl) in enumerate(row)
    ]
    return Sensitivity("m", "t", 1, 64, 10 * len(rows), 7, tuple(made))


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.floats(0, 9)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_the_knapsack_is_as_good_as_trying_everything(rows, share):
    table = costs(rows)
    smallest, largest = (7 + sum(f(s for s, _ in row) for row in rows) for f in (min, max))
    budget = int(smallest + share * (largest - smallest))
    best = min(
        sum(kl for _, kl in pick)
        for pick in itertools.product(*rows)
        if 7 + sum(size for size, _ in pick) <= budget
    )
    got = allocate(table, size=budget)
    assert got.kl == pytest.approx(best)
    assert got.bytes <= budget
    assert len(got.chosen) == len(rows)


def test_a_budget_is_needed_and_must_do():
    table = costs([[(10, 1.0), (20, 0.0)]])
    assert allocate(table, bits=27 * 8 / 10).kl == 0
    for budget in ({}, {"bits": 4, "size": 100}):
        with pytest.raises(InvalidRequest, match="needs a budget"):
            allocate(table, **budget)
    with pytest.raises(InvalidRequest, match="takes 17 bytes"):
        allocate(table, size=16)


def test_sensitivities_are_what_whole_models_show(found: Sensitivity, tmp_path: Path):
    """One tensor quantized in a converted folder has the divergence that was measured for it."""
    name = "model.layers.3.mlp.down_proj.weight"
    recipe = allocate(found, size=10**9).recipe  # everything kept
    assert set(recipe.tensors.values()) == {KEEP}
    alone = {**recipe.tensors, name: "q3"}
    convert(demo_file(), tmp_path / "m", quant=type(recipe)(quant="q8", tensors=alone))
    cost = next(c for c in found.costs if c.name == name and c.quant == "q3")
    tokens = LLM("demo", backend="mlx", dtype="float32")
    with tokens as base, LLM(str(tmp_path / "m"), backend="mlx", dtype="float32") as made:
        ids = base.tokenize(demo_text().text)[:32]
        p, q = (log_softmax(llm.logits(ids)) for llm in (base, made))
    kl = (np.exp(p) * (p - q)).sum() / len(ids)
    assert cost.kl == pytest.approx(kl, rel=0.02)
    one = next(t for t in tensor_errors(tmp_path / "m", "demo").tensors if t.name == name)
    assert one.rms == pytest.approx(cost.rms, rel=0.01)


def demo_file() -> Path:
    from rl_mlx.demo import demo_path

    return demo_path()


def log_softmax(logits) -> np.ndarray:
    wide = mx.array(logits)
    return np.array(wide - mx.logsumexp(wide, axis=-1, keepdims=True), np.float64)


def test_fewer_bits_cost_more(found: Sensitivity):
    by_name: dict[str, dict[str, Cost]] = {}
    for cost in found.costs:
        by_name.setdefault(cost.name, {})[cost.quant] = cost
    assert len(by_name) == 4 * 7 + 1
    for one in by_name.values():
        assert one["q3"].rms > one["q4"].rms > one["q6"].rms > one[KEEP].rms == 0
        assert one["q3"].bytes < one["q4"].bytes < one["q6"].bytes < one[KEEP].bytes
        assert one["q3"].kl > one["q6"].kl > one[KEEP].kl == 0
    layers = found.layers("q3")
    assert set(layers) == {None, 0, 1, 2, 3}
    assert sum(layers.values()) == pytest.approx(sum(c.kl for c in found.costs if c.quant == "q3"))


def test_it_beats_uniform_bits_of_the_same_size(found: Sensitivity, tmp_path: Path):
    convert(demo_file(), tmp_path / "uniform", quant="q4")
    uniform = inspect(tmp_path / "uniform")
    chosen = allocate(found, size=uniform.weight_bytes)
    convert(demo_file(), tmp_path / "chosen", quant=chosen.recipe)
    made = inspect(tmp_path / "chosen")
    assert made.weight_bytes == chosen.bytes <= uniform.weight_bytes
    unseen = demo_text(seed=7)
    kl = {}
    with LLM("demo", backend="mlx") as base:
        for name in ("uniform", "chosen"):
            with LLM(str(tmp_path / name), backend="mlx") as llm:
                kl[name] = divergence(llm, base, unseen, window=96, stride=96, tokens=96).mean
    assert kl["chosen"] < 0.8 * kl["uniform"]


def test_the_results_can_be_kept(found: Sensitivity, tmp_path: Path):
    found.save(tmp_path / "s.parquet")
    assert Sensitivity.load(tmp_path / "s.parquet") == found
    chosen = allocate(found, bits=4.5)
    chosen.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == chosen
    assert found.plot().get_title(loc="left").startswith("At q3, model.embed_tokens costs most")
    assert chosen.plot().get_ylabel() == "layer"


def test_a_text_must_be_long_enough():
    with pytest.raises(InvalidRequest, match="fewer than 2 windows of 9000"):
        sensitivity("demo", demo_text(2), window=9000, windows=2)
    with pytest.raises(InvalidRequest, match="no quant 'q7'"):
        sensitivity("demo", quants=["q7"])
