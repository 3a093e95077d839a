"""What ``quant`` asks for: which tensors are quantized, and how, by their role and name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType

from rl_mlx.convert.pieces import Holding
from rl_mlx.convert.weights import FloatType, Mode
from rl_mlx.errors import InvalidRequest

QUANTS: Mapping[str, tuple[int, int, Mode]] = MappingProxyType(
    {f"q{bits}": (bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)}
    | {"mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8"), "nvfp4": (4, 16, "nvfp4")}
)
"""Name -> bits, group size and mode of MLX."""
KEEP = "keep"
"""In place of a quant: leave the tensor as it is."""
GROUP_SIZES = (32, 64, 128)

# One pattern a role; what none of them is has no role.
_ROLES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "v": re.compile(r".*self_attn\.v_proj"),
        "o": re.compile(r".*(self_attn\.(o_proj|out_proj|dense)|\.attn\.c_proj)"),
        "down": re.compile(r".*(\.down_proj|feed_forward\.w2|\.fc2|mlp\.c_proj)"),
        "embed": re.compile(r".*(embed_tokens|\.wte|\.wpe)"),
        "head": re.compile(r"lm_head"),
        "router": re.compile(r".*(mlp\.gate|mlp\.router|block_sparse_moe\.(gate|router\.layer))"),
    }
)
ROLES = tuple(_ROLES)
_MIXED_ROLES = ("v", "o", "down", "embed", "head")
_WIDER: Mapping[str, str] = MappingProxyType(
    {"q2": "q4", "q3": "q5", "q4": "q6", "q5": "q8", "q6": "q8", "q8": "q8"}
    | {"mxfp4": "mxfp8", "nvfp4": "mxfp8", "mxfp8": "mxfp8"}
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized.

    ``quant`` is for every matrix; ``mixed`` takes the next wider one where errors hurt most: the
    attention's values and output, the feed-forward's way down, embeddings and head (llama.cpp's
    ``_M`` files do likewise). A router always has 8 bits. ``roles`` (``ROLES`` -> quant) go over
    these, and ``tensors`` (a pattern of names, ``*`` for anything -> quant) over all; the last
    pattern that fits counts. Raises ``InvalidRequest`` for what is not known.
    """

    quant: str
    group_size: int | None = None
    mixed: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for quant in (self.quant, *self.roles.values(), *self.tensors.values()):
            if quant not in QUANTS and (quant != KEEP or quant == self.quant):
                raise InvalidRequest(f"no quant {quant!r}; known are {', '.join(QUANTS)}")
        for role in self.roles:
            if role not in ROLES:
                raise InvalidRequest(f"no role {role!r}; known are {', '.join(ROLES)}")
        if self.group_size is None:
            return
        if self.group_size not in GROUP_SIZES:
            raise InvalidRequest(f"group_size must be 32, 64 or 128, not {self.group_size!r}")
        if QUANTS[self.quant][2] != "affine":
            raise InvalidRequest(
                f"{self.quant} has groups of {QUANTS[self.quant][1]}; leave group_size out"
            )

    def holding(self, name: str, shape: tuple[int, ...], scales: FloatType) -> Holding | None:
        """The container for a tensor; None for one that is not to be quantized.

        That is every vector, and what has rows that are not whole groups of any size.
        """
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) < 2:
            return None
        quant = self._quant(module)
        if quant == KEEP:
            return None
        bits, group, mode = QUANTS[quant]
        if mode != "affine":
            return None if shape[-1] % 32 else Holding("float32", bits, group, mode, fresh=True)
        sizes = [g for g in reversed(GROUP_SIZES) if g <= (self.group_size or group)]
        found = next((g for g in sizes if shape[-1] % g == 0), None)
        return Holding(scales, bits, found, fresh=True) if found else None

    def _quant(self, module: str) -> str:
        role = next((role for role, pattern in _ROLES.items() if pattern.fullmatch(module)), None)
        quant = self.quant
        if role == "router":
            quant = "q8"
        elif self.mixed and role in _MIXED_ROLES:
            quant = _WIDER[quant]
        if role is not None:
            quant = self.roles.get(role, quant)
        for pattern, chosen in self.tensors.items():
            if fnmatchcase(module, pattern) or fnmatchcase(f"{module}.weight", pattern):
                quant = chosen
        return quant
