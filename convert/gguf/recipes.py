"""llama.cpp's recipes: which type each tensor of a ``Q4_K_M`` file, say, has.

A recipe has one type for most matrices and gives more bits, or fewer, to those where it pays. The
rules are those of ``llama-quantize`` (``src/llama-quant.cpp``, release b11549).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.errors import InvalidRequest

T = GGMLType


@dataclass(frozen=True)
class Recipe:
    """A kind of file: the type of most matrices, and its number as ``general.file_type``."""

    name: str
    type: GGMLType
    number: int


_RECIPES = (
    Recipe("F32", T.F32, 0),
    Recipe("F16", T.F16, 1),
    Recipe("Q4_0", T.Q4_0, 2),
    Recipe("Q4_1", T.Q4_1, 3),
    Recipe("Q8_0", T.Q8_0, 7),
    Recipe("Q5_0", T.Q5_0, 8),
    Recipe("Q5_1", T.Q5_1, 9),
    Recipe("Q2_K", T.Q2_K, 10),
    Recipe("Q3_K_S", T.Q3_K, 11),
    Recipe("Q3_K_M", T.Q3_K, 12),
    Recipe("Q3_K_L", T.Q3_K, 13),
    Recipe("Q4_K_S", T.Q4_K, 14),
    Recipe("Q4_K_M", T.Q4_K, 15),
    Recipe("Q5_K_S", T.Q5_K, 16),
    Recipe("Q5_K_M", T.Q5_K, 17),
    Recipe("Q6_K", T.Q6_K, 18),
    Recipe("IQ2_XXS", T.IQ2_XXS, 19),
    Recipe("IQ2_XS", T.IQ2_XS, 20),
    Recipe("Q2_K_S", T.Q2_K, 21),
    Recipe("IQ3_XS", T.IQ3_S, 22),
    Recipe("IQ3_XXS", T.IQ3_XXS, 23),
    Recipe("IQ1_S", T.IQ1_S, 24),
    Recipe("IQ4_NL", T.IQ4_NL, 25),
    Recipe("IQ3_S", T.IQ3_S, 26),
    Recipe("IQ3_M", T.IQ3_S, 27),
    Recipe("IQ2_S", T.IQ2_XS, 28),
    Recipe("IQ2_M", T.IQ2_S, 29),
    Recipe("IQ4_XS", T.IQ4_XS, 30),
    Recipe("IQ1_M", T.IQ1_M, 31),
    Recipe("BF16", T.BF16, 32),
    Recipe("TQ1_0", T.TQ1_0, 36),
    Recipe("TQ2_0", T.TQ2_0, 37),
    Recipe("MXFP4_MOE", T.MXFP4, 38),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})
_ALIASES = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})


def recipe(name: str) -> Recipe:
    """The recipe of a name, upper or lower case; ``InvalidRequest`` where there is none."""
    found = RECIPES.get(_ALIASES.get(name.upper(), name.upper()))
    if found is None:
        raise InvalidRequest(f"no quant {name!r} for GGUF; known are {', '.join(RECIPES)}")
    return found


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model. ``experts`` is 0 for a dense one."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    has_importance: bool

    @property
    def shares_keys(self) -> bool:
        """Whether four query heads or more share a key head, so that values are few."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def is_70b(self) -> bool:
        """A large Llama 2 or Qwen 2, of which eight heads share their values."""
        large = self.layers == 80 and self.architecture in {"llama", "qwen2"}
        return large and self.heads != self.kv_heads


_UNQUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "shortconv.conv.weight",
    "ssm_conv1d",
    "position_embd.weight",
)


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether ``llama-quantize`` touches the tensor of this GGUF name at all."""
    return (
        len(shape) > 1
        and name.endswith("weight")
        and not any(part in name for part in _UNQUANTIZED)
    )


def tensor_types(
    made: Recipe, tensors: Sequence[tuple[str, tuple[int, ...]]], facts: ModelFacts
) -> dict[str, GGMLType]:
    """The type of each tensor (GGUF name and shape, layers in order) that is quantized."""
    roles = {name: _role(name) for name, _ in tensors}
    tied = "output.weight" not in roles
    counts = {role: sum(r == role for r in roles.values()) for role in _RULES}
    seen: dict[str, int] = dict.fromkeys(_RULES, 0)
    types = {}
    for name, shape in tensors:
        if not is_quantized(name, shape):
            continue
        role = roles[name]
        kind = made.type
        if kind.block_size > 1:
            if role == "output" or (tied and role == "embedding"):
                kind = _head(made, shape)
            elif made.name == "MXFP4_MOE":
                kind = T.MXFP4 if len(shape) > 2 else T.Q8_0
            elif role in _RULES:
                place = _Place(seen[role], counts[role], facts)
                if role.startswith("ffn"):
                    place = _Place(_layer(name) if facts.experts > 1 else seen[role],
                                   facts.layers, facts)  # fmt: skip
                kind = _RULES[role](made.name, place) or kind
                seen[role] += 1
            kind = _fitting(kind, shape[-1])
        types[name] = kind
    return types


def needs_importance(name: str, kind: GGMLType, made: Recipe) -> bool:
    """Whether a tensor is garbage in this type without an importance matrix."""
    if name in {"token_embd.weight", "output.weight"}:
        return False
    low = {T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S}
    return kind in low or (kind == T.Q2_K and made.name == "Q2_K_S")


_PARTS = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)


def _role(name: str) -> str:
    if name in {"output.weight", "token_embd.weight"}:
        return "output" if name == "output.weight" else "embedding"
    return next((role for part, role in _PARTS if part in name), "other")


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class _Place:
    """The ``index``-th of ``count`` tensors of a role."""

    index: int
    count: int
    facts: ModelFacts

    @property
    def is_early(self) -> bool:
        return self.index < self.count // 8

    @property
    def gets_more(self) -> bool:
        """Of the first and the last eighth, or every third between them."""
        eighth = self.count // 8
        late = self.index >= 7 * self.count // 8
        return self.index < eighth or late or (self.index - eighth) % 3 == 2


_LOW = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"})
_LOW_S = frozenset({"IQ2_S", "IQ2_M"})


def _head(made: Recipe, shape: tuple[int, ...]) -> GGMLType:
    """The output, which the embedding is too where they are one."""
    if made.name == "MXFP4_MOE" or made.type == T.Q8_0 or shape[-1] % made.type.block_size:
        return T.Q8_0
    return T.Q5_K if made.name in {*_LOW, "IQ3_XXS"} else T.Q6_K


def _embedding(name: str, _: _Place) -> GGMLType | None:
    if name in {"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"}:
        return T.Q2_K
    if name in {*_LOW_S, "IQ3_XXS"}:
        return T.IQ3_S
    return T.Q4_K if name in {"TQ1_0", "TQ2_0"} else None


def _values(name: str, place: _Place) -> GGMLType | None:
    facts = place.facts
    if name in _LOW:
        if facts.shares_keys or facts.experts >= 4:
            return T.Q4_K
        return T.IQ3_S if name in _LOW_S else T.Q2_K
    if facts.experts == 8:
        return T.Q8_0
    kind = _plain_values(name, place)
    if facts.is_70b and (kind or RECIPES[name].type) in {T.Q3_K, T.Q4_K}:
        return T.Q5_K
    return kind


def _plain_values(name: str, place: _Place) -> GGMLType | None:
    shared = place.facts.shares_keys
    if name == "Q2_K":
        return T.Q4_K if shared else T.Q3_K
    if name == "IQ3_XXS":
        return T.Q4_K if shared else (None if place.facts.has_importance else T.IQ3_S)
    if name in {"Q2_K_S", "IQ3_XS", "IQ3_S"}:
        return T.Q4_K if shared else None
    if name in {"IQ4_NL", "IQ4_XS"}:
        return T.Q5_K if shared else None
    if name in {"Q4_K_M", "Q5_K_M"}:
        return T.Q6_K if place.gets_more else None
    if name == "Q4_K_S":
        return T.Q5_K if place.index < 4 else None
    if name == "Q3_K_M":
        return T.Q5_K if place.index < 2 else T.Q4_K
    return {"IQ3_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(name)


def _keys(name: str, place: _Place) -> GGMLType | None:
    if place.facts.experts == 8:
        return T.Q4_K if name in _LOW else T.Q8_0
    return _queries(name, place)


def _queries(name: str, _: _Place) -> GGMLType | None:
    return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(name)


_EIGHT_EXPERTS = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S"}
    | {"IQ3_M", "IQ4_XS"}
)


def _attention_output(name: str, place: _Place) -> GGMLType | None:
    if place.facts.experts == 8:
        return T.Q5_K if name in _EIGHT_EXPERTS | _LOW else None
    if name in {"IQ1_S", "IQ1_M"}:
        return T.IQ2_XXS
    if name in {*_LOW_S, "IQ3_XXS"}:
        return T.IQ3_S
    return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_M": T.Q4_K}.get(name)


def _down(name: str, place: _Place) -> GGMLType | None:
    facts = place.facts
    if name in {"Q4_K_M", "Q5_K_M"}:
        return T.Q6_K if place.gets_more else None
    if name == "Q3_K_M":
        return T.Q5_K if place.index < place.count // 16 else T.Q4_K
    if name == "IQ3_XXS" and not facts.has_importance:
        return T.Q4_K if place.is_early else T.Q3_K
    if name == "IQ3_M" and facts.experts == 8 and place.gets_more:
        return T.Q4_K
    if name in {"Q2_K", "Q3_K_L"}:
        return T.Q3_K if name == "Q2_K" else T.Q5_K
    return _early_down(name, has_importance=facts.has_importance) if place.is_early else None


def _early_down(name: str, *, has_importance: bool) -> GGMLType | None:
    if name in _LOW:
        return T.IQ3_S if name in _LOW_S else T.Q2_K
    if name in {"IQ4_NL", "IQ4_XS"}:
        return None if has_importance else T.Q5_K
    if name in {"Q4_0", "Q5_0"}:
        return {"Q4_0": T.Q4_1, "Q5_0": T.Q5_1}[name] if has_importance else None
    return {"Q2_K_S": T.Q4_K, "IQ3_M": T.Q4_K, "Q4_K_S": T.Q5_K}.get(name)


def _gate_and_up(name: str, place: _Place) -> GGMLType | None:
    middle = not place.is_early and place.index < 7 * place.count // 8
    return T.IQ3_XXS if name == "IQ3_XS" and middle else None


_RULES: Mapping[str, Callable[[str, _Place], GGMLType | None]] = MappingProxyType(
    {
        "embedding": _embedding,
        "attn_v": _values,
        "attn_k": _keys,
        "attn_q": _queries,
        "attn_output": _attention_output,
        "ffn_down": _down,
        "ffn_gate": _gate_and_up,
        "ffn_up": _gate_and_up,
    }
)
_FALLBACKS: Mapping[GGMLType, GGMLType] = MappingProxyType(
    dict.fromkeys(
        (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL
    )
    | dict.fromkeys((T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0)
    | {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
)


def _fitting(kind: GGMLType, columns: int) -> GGMLType:
    """A type of smaller blocks where rows are not whole ones; at last F16."""
    if columns % kind.block_size == 0:
        return kind
    kind = _FALLBACKS.get(kind, kind)
    return kind if columns % kind.block_size == 0 else T.F16
