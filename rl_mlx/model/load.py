"""From a model on disk to a decoder in MLX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rl_mlx.convert.weights import Dense, FloatType, Weights
from rl_mlx.errors import FormatError, UnsupportedModel
from rl_mlx.model.attention import Attention
from rl_mlx.model.decoder import Block, Both, Decoder, Mixer
from rl_mlx.model.families import FAMILIES
from rl_mlx.model.gated_delta import GatedDelta
from rl_mlx.model.layers import (
    DenseMatrix,
    FusedLinear,
    LayerNorm,
    Linear,
    Matrix,
    Norm,
    QuantizedMatrix,
    RMSNorm,
    SplitLinear,
    laid_out,
)
from rl_mlx.model.mamba import Mamba
from rl_mlx.model.mamba2 import Mamba2
from rl_mlx.model.mla import LatentAttention, Queries
from rl_mlx.model.mlp import MLP, ExpertLinear, MoE, PlainMLP, Router, SharedExpert
from rl_mlx.model.plan import (
    AttentionPlan,
    BothPlan,
    ConvPlan,
    DecoderPlan,
    DeltaPlan,
    LatentPlan,
    MambaPlan,
    MixerPlan,
    MLPPlan,
    MoEPlan,
    SelectivePlan,
    first_slot,
)
from rl_mlx.model.rope import Rope
from rl_mlx.model.shortconv import ShortConv

DTYPES: dict[FloatType, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a family here runs this config."""
    return config.get("model_type") in FAMILIES


def load_decoder(
    weights: Weights,
    context: int,
    dtype: FloatType,
    *,
    exact: bool = False,
    unpack: bool = False,
) -> Decoder:
    """The decoder of ``weights``, computing in ``dtype``, for sequences of up to ``context``
    tokens.

    ``exact`` keeps dense what no packed container holds to the last bit, ``unpack`` everything.
    Tensors are read and evaluated one block at a time, so the peak is the model plus a block.
    Raises ``UnsupportedModel`` for an unknown family and ``FormatError`` where config and tensors
    disagree.
    """
    family = str(weights.config.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedModel(f"architecture {family!r} is not one of {', '.join(FAMILIES)}")
    try:
        plan = FAMILIES[family](weights.config, context)
    except KeyError as missing:
        raise FormatError(f"{weights.path}: the configuration lacks {missing}") from missing
    except ZeroDivisionError as error:
        raise FormatError(f"{weights.path}: a divisor of the configuration is 0") from error
    return _Builder(weights, plan, dtype, exact, unpack).decoder()


def reload(
    decoder: Decoder, weights: Weights, dtype: FloatType, name: str, *, unpack: bool = False
) -> Decoder:
    """``decoder`` with the part that holds the tensor ``name`` read anew, from ``weights``.

    The rest is shared; ``unpack`` as for ``load_decoder``. For experiments with a tensor at a time.
    """
    build = _Builder(weights, decoder.plan, dtype, exact=False, unpack=unpack)
    layer = layer_of(decoder, name)
    if layer is None:
        return build.decoder(decoder.blocks)
    blocks = list(decoder.blocks)
    blocks[layer] = build.block(layer)
    return decoder.with_blocks(blocks)


def layer_of(decoder: Decoder, name: str) -> int | None:
    """The index of the block that the tensor ``name`` is part of; None for embeddings and head."""
    names = decoder.plan.names
    layers = f"{names.root}.{names.layers}."
    return int(name.removeprefix(layers).split(".")[0]) if name.startswith(layers) else None


class _Builder:
    """Reads tensors by canonical name and makes modules of them."""

    def __init__(
        self,
        weights: Weights,
        plan: DecoderPlan,
        dtype: FloatType,
        exact: bool,
        unpack: bool,
    ) -> None:
        self._weights = weights
        self._exact = exact
        self._unpack = unpack
        self._plan = plan
        self._float = dtype
        self._dtype = DTYPES[dtype]
        self._present = set(weights.names())

    def decoder(self, blocks: Sequence[Block] | None = None) -> Decoder:
        plan = self._plan
        embedding = self._matrix(f"{plan.names.root}.{plan.names.embedding}")
        at = plan.names.positions
        positions = self._matrix(f"{plan.names.root}.{at}") if at else None
        if blocks is None:
            blocks = [self.block(i) for i in range(len(plan.layers))]
        tied = plan.tied or "lm_head.weight" not in self._present
        head = Linear(embedding) if tied else self._linear("lm_head", plan.head_bias)
        norm = self._norm(f"{plan.names.root}.{plan.names.final_norm}", plan.norm_bias)
        return Decoder(plan, embedding, blocks, norm, head, self._dtype, positions)

    def block(self, index: int) -> Block:
        names, layer = self._plan.names, self._plan.layers[index]
        at = f"{names.root}.{names.layers}.{index}."
        mixer = self._mixer(first_slot(self._plan, index), at, layer.mixer)
        at_mlp = f"{at}{names.mlp}."
        if isinstance(layer.mlp, MoEPlan):
            mlp: MLP | PlainMLP | MoE | None = self._moe(at_mlp, layer.mlp)
        else:
            mlp = None if layer.mlp is None else self._mlp(at_mlp, layer.mlp)
        norms = self._optional_norm(at, names.mixer_norm), self._optional_norm(at, names.mlp_norm)
        post_norms = (
            self._optional_norm(at, names.mixer_post_norm),
            self._optional_norm(at, names.mlp_post_norm),
        )
        return Block(self._plan, mixer, mlp, norms, post_norms)

    def _mixer(self, slot: int, at: str, plan: MixerPlan) -> Mixer:
        names = self._plan.names
        if isinstance(plan, BothPlan):
            attention = self._attention(slot, f"{at}{names.attention}.", plan.attention)
            return Both(attention, self._mamba(slot + 1, f"{at}{names.mamba}.", plan.mamba))
        if isinstance(plan, ConvPlan):
            return self._conv(slot, f"{at}conv.", plan)
        if isinstance(plan, DeltaPlan):
            return self._delta(slot, f"{at}linear_attn.", plan)
        if isinstance(plan, MambaPlan):
            return self._mamba(slot, f"{at}{names.mamba}.", plan)
        if isinstance(plan, SelectivePlan):
            return self._selective(slot, f"{at}{names.mamba}.", plan)
        at = f"{at}{names.attention}."
        if isinstance(plan, LatentPlan):
            return self._latent_attention(slot, at, plan)
        return self._attention(slot, at, plan)

    def _selective(self, index: int, at: str, plan: SelectivePlan) -> Mamba:
        biases = {"in": plan.bias, "x": False, "dt": True, "out": plan.bias}
        project, select, widen, out = (self._linear(f"{at}{n}_proj", b) for n, b in biases.items())
        bias = self._small(f"{at}conv1d.bias") if plan.kernel_bias else None
        kernel = self._array(f"{at}conv1d.weight").astype(self._dtype), bias
        log_rate, skip = self._array(f"{at}A_log"), self._array(f"{at}D")
        return Mamba(index, plan, (project, select, widen, out), kernel, log_rate, skip)

    def _mamba(self, index: int, at: str, plan: MambaPlan) -> Mamba2:
        bias = self._small(f"{at}conv1d.bias") if plan.kernel_bias else None
        kernel = self._array(f"{at}conv1d.weight").astype(self._dtype), bias
        log_rate, step, skip = (self._array(at + n) for n in ("A_log", "dt_bias", "D"))
        norm = self._array(f"{at}norm.weight") if plan.norm else None
        project, out = (self._linear(f"{at}{n}_proj", plan.bias) for n in ("in", "out"))
        eps = self._plan.norm_eps
        return Mamba2(index, plan, project, kernel, (log_rate, step, skip), norm, eps, out)

    def _attention(self, index: int, at: str, plan: AttentionPlan) -> Attention:
        names = self._plan.names
        qkv: FusedLinear | SplitLinear
        if plan.fused_qkv:
            queries = plan.heads * plan.head_dim
            cuts = [queries, queries + plan.kv_heads * plan.head_dim]
            qkv = SplitLinear(self._linear(at + names.qkv, plan.bias), cuts)
        else:
            qkv = FusedLinear([self._linear(f"{at}{n}_proj", plan.bias) for n in "qkv"])
        rope = None
        if plan.rope is not None:
            has_factors = "rope_freqs.weight" in self._present
            rope = Rope(plan.rope, self._array("rope_freqs.weight") if has_factors else None)
        norms: tuple[Norm, Norm] | None = None
        if plan.qk_norm and plan.qk_norm_of == "rotated":
            unit = RMSNorm(None, self._plan.norm_eps)
            norms = unit, unit
        elif plan.qk_norm:
            norms = (
                self._norm(at + names.q_norm, has_bias=False),
                self._norm(at + names.k_norm, has_bias=False),
            )
        sinks = self._small(f"{at}sinks") if plan.sinks else None
        out = self._linear(at + names.out, plan.out_bias)
        return Attention(index, plan, qkv, out, rope, norms, sinks)

    def _latent_attention(self, index: int, at: str, plan: LatentPlan) -> LatentAttention:
        if plan.query_latent is None:
            queries = Queries(None, self._linear(f"{at}q_proj", has_bias=False))
        else:
            down = self._linear(f"{at}q_a_proj", plan.bias), self._rms(f"{at}q_a_layernorm")
            queries = Queries(down, self._linear(f"{at}q_b_proj", has_bias=False))
        compress = self._linear(f"{at}kv_a_proj_with_mqa", plan.bias)
        heads = self._matrix(f"{at}embed_q"), self._matrix(f"{at}unembed_out")
        out = self._linear(f"{at}o_proj", plan.bias)
        norm, rope = self._rms(f"{at}kv_a_layernorm"), Rope(plan.rope)
        return LatentAttention(index, plan, queries, compress, norm, heads, out, rope)

    def _delta(self, index: int, at: str, plan: DeltaPlan) -> GatedDelta:
        parts = [self._linear(f"{at}in_proj_{n}", has_bias=False) for n in ("qkv", "z", "b", "a")]
        kernel = self._array(f"{at}conv1d.weight").astype(self._dtype)
        decay = self._array(f"{at}A_log"), self._array(f"{at}dt_bias")
        norm, eps = self._array(f"{at}norm.weight"), self._plan.norm_eps
        out = self._linear(f"{at}out_proj", has_bias=False)
        return GatedDelta(index, plan, FusedLinear(parts), kernel, decay, norm, eps, out)

    def _conv(self, index: int, at: str, plan: ConvPlan) -> ShortConv:
        kernel = self._small(f"{at}conv.weight")
        bias = self._small(f"{at}conv.bias") if plan.bias else None
        project = self._linear(f"{at}in_proj", plan.bias)
        return ShortConv(index, project, kernel, bias, self._linear(f"{at}out_proj", plan.bias))

    def _mlp(self, at: str, plan: MLPPlan) -> MLP | PlainMLP:
        names = self._plan.names
        down = self._linear(at + names.down, plan.bias)
        if not plan.gated:
            return PlainMLP(plan, self._linear(at + names.up, plan.bias), down)
        gate_up: FusedLinear | SplitLinear
        if plan.fused_gate_up:
            gate_up = SplitLinear(self._linear(f"{at}gate_up_proj", plan.bias), [plan.inner])
        else:
            parts = [self._linear(at + n, plan.bias) for n in (names.gate, names.up)]
            gate_up = FusedLinear(parts)
        return MLP(plan, gate_up, down)

    def _moe(self, at: str, plan: MoEPlan) -> MoE:
        names, choice = self._plan.names, plan.router
        correction = self._array(at + choice.correction) if choice.correction else None
        router = Router(choice, self._linear(at + names.router, choice.bias), correction)
        experts = [
            self._expert(f"{at}{names.experts}.{n}", plan.bias)
            for n in ("gate_proj", "up_proj", "down_proj")
        ]
        shared = None
        if plan.shared is not None:
            mlp = self._mlp(f"{at}{names.shared}.", MLPPlan(inner=plan.shared))
            gate = Linear(self._matrix(at + names.shared_gate)) if plan.shared_gate else None
            shared = SharedExpert(mlp, gate)
        return MoE(plan, router, experts, shared)

    def _expert(self, name: str, has_bias: bool) -> ExpertLinear:
        bias = self._small(f"{name}.bias") if has_bias else None
        return ExpertLinear(self._matrix(name), bias)

    def _linear(self, name: str, has_bias: bool) -> Linear:
        bias = self._small(f"{name}.bias") if has_bias else None
        return Linear(self._matrix(name), bias)

    def _optional_norm(self, at: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(at + name, self._plan.norm_bias)

    def _norm(self, name: str, has_bias: bool) -> Norm:
        plan = self._plan
        if plan.norm == "rms":
            return self._rms(name)
        weight = self._array(f"{name}.weight") + plan.norm_offset
        weight = _evaluated(weight.astype(self._dtype))
        bias = self._small(f"{name}.bias") if has_bias else None
        return LayerNorm(weight, bias, plan.norm_eps)

    def _rms(self, name: str) -> RMSNorm:
        weight = self._array(f"{name}.weight") + self._plan.norm_offset
        return RMSNorm(_evaluated(weight.astype(self._dtype)), self._plan.norm_eps)

    def _matrix(self, name: str) -> Matrix:
        tensor = self._load(f"{name}.weight")
        if isinstance(tensor, Dense):
            dense = _float_array(tensor.array, tensor.dtype, self._dtype)
            return DenseMatrix(_evaluated(laid_out(dense)))
        scales = _scale_array(tensor.scales, tensor.dtype, self._dtype)
        biases = None
        if tensor.biases is not None:
            biases = _evaluated(_float_array(tensor.biases, tensor.dtype, self._dtype))
        packed = QuantizedMatrix(
            mx.array(tensor.weight), _evaluated(scales), biases,
            tensor.group_size, tensor.bits, tensor.mode,
        )  # fmt: skip
        return packed.unpacked(self._dtype) if self._unpack else packed

    def _small(self, name: str) -> mx.array:
        """A small tensor, in the compute type."""
        return _evaluated(self._array(name).astype(self._dtype))

    def _array(self, name: str) -> mx.array:
        """A small tensor, in float32."""
        tensor = self._load(name)
        if not isinstance(tensor, Dense):
            raise FormatError(f"{self._weights.path}: tensor {name!r} must not be quantized")
        return _evaluated(_float_array(tensor.array, tensor.dtype, mx.float32))

    def _load(self, name: str) -> Any:
        if name not in self._present:
            raise FormatError(f"{self._weights.path}: tensor {name!r} is missing")
        return self._weights.load(name, self._float, exact=self._exact)


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def _float_array(array: npt.NDArray[Any], kind: FloatType, dtype: mx.Dtype) -> mx.array:
    """An MLX array of ``dtype``; bfloat16 comes as uint16 bit patterns."""
    raw = mx.array(np.ascontiguousarray(array))
    return (raw.view(mx.bfloat16) if kind == "bfloat16" else raw).astype(dtype)


def _scale_array(array: npt.NDArray[Any], kind: FloatType, dtype: mx.Dtype) -> mx.array:
    """Scales in ``dtype``; those of the block-float modes are uint8 and stay so."""
    if array.dtype == np.uint8:
        return mx.array(np.ascontiguousarray(array))
    return _float_array(array, kind, dtype)
