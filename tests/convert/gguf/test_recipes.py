"""llama.cpp's recipes: what the files in ../shared, of one small model, do not show."""

from __future__ import annotations

import pytest

from rl_mlx.convert.gguf.recipes import (
    RECIPES,
    ModelFacts,
    is_quantized,
    needs_importance,
    recipe,
    tensor_types,
)
from rl_mlx.convert.gguf.types import GGMLType as T
from rl_mlx.errors import InvalidRequest

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def facts(**changes) -> ModelFacts:
    told = {"architecture": "llama", "layers": 32, "heads": 32, "kv_heads": 8, "experts": 0,
            "has_importance": False}  # fmt: skip
    return ModelFacts(**(told | changes))


def types(name: str, *, columns: int = 4096, tied: bool = False, **changes) -> dict[str, T]:
    model = facts(**changes)
    tensors = [("token_embd.weight", (1000, columns))]
    for i in range(model.layers):
        for part in PARTS:
            moe = model.experts and part.startswith("ffn")
            shape = (model.experts, 64, columns) if moe else (64, columns)
            tensors.append((f"blk.{i}.{part}{'_exps' if moe else ''}.weight", shape))
        tensors.append((f"blk.{i}.attn_norm.weight", (columns,)))
    if not tied:
        tensors.append(("output.weight", (1000, columns)))
    return tensor_types(recipe(name), tensors, model)


def layers(found: dict[str, T], part: str) -> list[T]:
    return [kind for name, kind in found.items() if part in name]


def test_q4_k_m_of_llama_3_8b() -> None:
    """The mixture that every Q4_K_M file of Llama 3 8B on the hub has."""
    found = types("Q4_K_M")
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert [i for i, kind in enumerate(layers(found, "attn_v")) if kind == T.Q6_K] == more
    assert [i for i, kind in enumerate(layers(found, "ffn_down")) if kind == T.Q6_K] == more
    assert set(layers(found, "ffn_up") + layers(found, "attn_q")) == {T.Q4_K}
    assert (found["token_embd.weight"], found["output.weight"]) == (T.Q4_K, T.Q6_K)
    assert types("Q4_K_M", tied=True)["token_embd.weight"] == T.Q6_K
    assert "blk.0.attn_norm.weight" not in found


def test_eight_experts_and_seventy_billion() -> None:
    found = types("Q4_K_M", experts=8)
    assert set(layers(found, "attn_v") + layers(found, "attn_k")) == {T.Q8_0}
    assert set(layers(found, "attn_output")) == {T.Q5_K}
    assert layers(found, "ffn_down_exps")[6] == T.Q6_K
    large = types("Q4_K_M", layers=80, heads=64, kv_heads=8)
    assert set(layers(large, "attn_v")) == {T.Q5_K, T.Q6_K}
    assert set(layers(types("MXFP4_MOE", experts=32), "_exps")) == {T.MXFP4}
    assert set(layers(types("MXFP4_MOE", experts=32), "attn")) == {T.Q8_0}


@pytest.mark.parametrize(
    ("name", "part", "changes", "expected"),
    [
        ("Q2_K", "attn_v", {}, {T.Q4_K}),
        ("Q2_K", "attn_v", {"kv_heads": 32}, {T.Q3_K}),
        ("Q3_K_S", "ffn_down", {}, {T.Q3_K}),
        ("Q3_K_M", "ffn_down", {}, {T.Q5_K, T.Q4_K}),
        ("Q3_K_L", "ffn_down", {}, {T.Q5_K}),
        ("Q3_K_L", "attn_output", {}, {T.Q5_K}),
        ("Q4_K_S", "attn_v", {}, {T.Q5_K, T.Q4_K}),
        ("Q5_K_S", "attn_v", {}, {T.Q5_K}),
        ("Q4_0", "ffn_down", {}, {T.Q4_0}),
        ("Q4_0", "ffn_down", {"has_importance": True}, {T.Q4_1, T.Q4_0}),
        ("IQ4_XS", "attn_v", {}, {T.Q5_K}),
        ("IQ4_NL", "ffn_down", {}, {T.Q5_K, T.IQ4_NL}),
        ("IQ4_NL", "ffn_down", {"has_importance": True}, {T.IQ4_NL}),
        ("IQ3_XS", "ffn_up", {}, {T.IQ3_S, T.IQ3_XXS}),
        ("IQ3_XXS", "attn_q", {}, {T.IQ2_S}),
        ("IQ2_M", "attn_output", {}, {T.IQ3_S}),
        ("IQ2_XXS", "ffn_down", {}, {T.Q2_K, T.IQ2_XXS}),
        ("IQ1_S", "token_embd", {}, {T.Q2_K}),
        ("IQ1_S", "output.weight", {"layers": 1}, {T.Q5_K, T.IQ2_XXS}),
        ("TQ1_0", "token_embd", {}, {T.Q4_K}),
        ("F16", "ffn_down", {}, {T.F16}),
        # rows of 100 x 32 weights are no whole blocks of 256
        ("Q4_K_M", "attn_q", {"columns": 3200}, {T.Q5_0}),
        ("Q6_K", "attn_q", {"columns": 3200}, {T.Q8_0}),
        ("Q2_K", "attn_q", {"columns": 3200}, {T.Q4_0}),
        ("IQ4_XS", "attn_q", {"columns": 3200}, {T.IQ4_NL}),
        ("Q4_0", "attn_q", {"columns": 3208}, {T.F16}),
    ],
)
def test_rules(name: str, part: str, changes: dict, expected: set[T]) -> None:
    assert set(layers(types(name, **changes), part)) == expected


def test_names() -> None:
    assert recipe("q4_k") is RECIPES["Q4_K_M"]
    assert len({r.number for r in RECIPES.values()}) == len(RECIPES)
    with pytest.raises(InvalidRequest, match=r"no quant 'Q7'.*Q4_K_M"):
        recipe("Q7")


def test_what_is_left_alone_and_what_needs_importance() -> None:
    assert is_quantized("blk.0.ffn_up.weight", (4, 4))
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias", "blk.0.shortconv.conv.weight"):
        assert not is_quantized(name, (4, 4))
    assert needs_importance("blk.0.attn_q.weight", T.IQ2_XS, recipe("IQ2_XS"))
    assert needs_importance("blk.0.attn_q.weight", T.Q2_K, recipe("Q2_K_S"))
    assert not needs_importance("blk.0.attn_q.weight", T.Q2_K, recipe("Q2_K"))
    assert not needs_importance("token_embd.weight", T.IQ3_XXS, recipe("IQ3_XXS"))
