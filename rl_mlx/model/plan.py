"""The plan of a decoder: all that a family decides, as plain data, before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "swiglu_oai"]


@dataclass(frozen=True, kw_only=True)
class RopePlan:
    """Rotary embedding of the first ``dims`` of each head (Su et al. 2021).

    Pairs are ``(i, i + dims / 2)``, or ``(2i, 2i + 1)`` where ``interleaved``.
    ``periods`` (``dims / 2`` numbers, ``base ** (2i / dims)`` and scaled) stand in for ``base``
    where the frequencies are not geometric. ``scale`` multiplies positions, ``magnitude`` the
    rotated values (YaRN, LongRoPE).
    """

    dims: int
    base: float = 10000.0
    scale: float = 1.0
    periods: tuple[float, ...] | None = None
    magnitude: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Grouped-query attention of one layer. ``window`` counts the token itself too; where it is
    ``chunked``, the text is cut into pieces of that length, and nothing is seen of earlier ones.

    ``qk_norm``: queries and keys are normed before rope, each head by the same weights, each by
    ``own`` ones, or all heads as one vector (``width``); or after rope and by none (``rotated``).
    ``gated``: each head's query comes with a gate for what the head gives, as much as its sigmoid.
    ``temperature``: ``(span, rate, first)`` makes queries grow, by ``rate * log`` of the spans so
    far, where the first position counts as ``first``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopePlan | None
    window: int | None = None
    softcap: float | None = None
    qk_norm: bool = False
    qk_norm_of: Literal["head", "own", "width", "rotated"] = "head"
    sinks: bool = False
    bias: bool = False
    out_bias: bool = False
    fused_qkv: bool = False
    gated: bool = False
    chunked: bool = False
    temperature: tuple[float, float, int] | None = None


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """Latent attention (DeepSeek): keys and values of all ``heads`` come of ``latent`` numbers.

    A head's query and key have ``nope_dim`` numbers without a position and those that ``rope``
    turns, of which the key's are shared. ``query_latent``: queries go through so many numbers too.
    """

    heads: int
    latent: int
    query_latent: int | None
    nope_dim: int
    value_dim: int
    scale: float
    rope: RopePlan
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvPlan:
    """Gated short convolution (LFM2): causal and depthwise, of ``taps`` over the hidden size."""

    taps: int
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MLPPlan:
    """A feed-forward layer of width ``inner``: ``down(f(gate(x)) * up(x))``, or ``down(f(up(x)))``
    where it is not ``gated``.
    """

    inner: int
    activation: Activation = "silu"
    bias: bool = False
    gated: bool = True
    fused_gate_up: bool = False


@dataclass(frozen=True, kw_only=True)
class RouterPlan:
    """How each token's ``active`` of ``experts`` are chosen, and how much each of them counts.

    Scores are a softmax or sigmoids of the router's logits. Those chosen are the highest, a
    ``correction`` added that counts for the choice alone (DeepSeek V3), out of the best
    ``active_groups`` of ``groups``; a group is as good as the sum of its ``group_best`` best
    experts. ``normalize`` makes the chosen scores sum to one, and ``scale`` multiplies them.
    """

    experts: int
    active: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: str | None = None
    groups: int = 1
    active_groups: int = 1
    group_best: int = 1


@dataclass(frozen=True, kw_only=True)
class MoEPlan:
    """A mixture of gated feed-forward layers of width ``inner``.

    A ``shared`` one of that width answers for every token too, ``shared_gate`` as much as a sigmoid
    says. ``weigh_inputs``: scores multiply what experts read instead of what they answer (Llama 4).
    """

    router: RouterPlan
    inner: int
    activation: Activation = "silu"
    bias: bool = False
    shared: int | None = None
    shared_gate: bool = False
    weigh_inputs: bool = False


@dataclass(frozen=True, kw_only=True)
class Names:
    """Where a family's tensors lie below ``model.layers.N.`` (canonical names, see
    ``convert/weights.py``); None where there is no such norm. The last ones lie below ``root``.
    """

    root: str = "model"
    attention: str = "self_attn"
    mamba: str = "mamba"
    qkv: str = "qkv_proj"
    out: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    mixer_norm: str | None = "input_layernorm"
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    experts: str = "switch_mlp"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"
    mixer_post_norm: str | None = None
    mlp_post_norm: str | None = None
    embedding: str = "embed_tokens"
    positions: str | None = None
    layers: str = "layers"
    final_norm: str = "norm"


@dataclass(frozen=True, kw_only=True)
class DeltaPlan:
    """A gated delta net (Qwen3-Next): a memory ``key_dim`` x ``value_dim`` for each value head,
    behind a causal convolution of ``taps``.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """What the convolution runs over: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class MambaPlan:
    """Mamba 2: a memory ``state`` x ``head_dim`` for each head, behind a causal convolution of
    ``taps``. Heads of a group share what they write and read by. ``norm``: one on the way out.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    norm: bool = True
    bias: bool = False
    kernel_bias: bool = True
    step_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        """The width of all heads together."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """What the convolution runs over: inputs, B and C."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True, kw_only=True)
class SelectivePlan:
    """Mamba 1: a memory of ``state`` numbers for each of ``inner`` channels, behind a causal
    convolution of ``taps``. ``inner_norm``: the epsilon of norms of what selects (Falcon Mamba).
    """

    inner: int
    state: int
    step_rank: int
    taps: int
    bias: bool = False
    kernel_bias: bool = True
    inner_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class BothPlan:
    """Attention and a Mamba of one input, added (Falcon-H1)."""

    attention: AttentionPlan
    mamba: MambaPlan


MixerPlan = AttentionPlan | LatentPlan | ConvPlan | DeltaPlan | MambaPlan | SelectivePlan | BothPlan


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One block: a mixer (attention or convolution) and a feed-forward layer."""

    mixer: MixerPlan
    mlp: MLPPlan | MoEPlan | None


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """A decoder.

    Norms are RMSNorms or LayerNorms (``norm``), with biases or without; ``norm_offset`` is added to
    their weights (1 for Gemma). ``parallel``: both branches of a block start from its input, and
    share a norm where the second has none. ``embed_scale``, ``residual_scale`` and ``logit_scale``
    multiply embeddings, what a branch adds, and logits.
    """

    hidden: int
    vocab: int
    context: int
    layers: tuple[LayerPlan, ...]
    norm_eps: float
    names: Names = Names()
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    parallel: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    tied: bool = False


@dataclass(frozen=True)
class KVSpec:
    """What a layer keeps for each token: keys and values of ``heads`` x ``dim``, the last
    ``window`` or all. ``chunked``: a token sees its own piece of so many alone.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    chunked: bool = False


@dataclass(frozen=True)
class StateSpec:
    """What a recurrent layer keeps for each sequence: its last ``taps - 1`` inputs of width
    ``width``, and a ``memory`` of that shape, float32.
    """

    taps: int
    width: int
    memory: tuple[int, ...] | None = None


CacheSpec = KVSpec | StateSpec


def cache_specs(plan: DecoderPlan) -> tuple[CacheSpec, ...]:
    """What each mixer of ``plan`` keeps, those that work side by side one after the other."""
    return tuple(
        _spec(mixer, plan.hidden) for layer in plan.layers for mixer in _parts(layer.mixer)
    )


def first_slot(plan: DecoderPlan, layer: int) -> int:
    """Where what the mixer of a layer keeps lies among ``cache_specs``."""
    return sum(len(_parts(before.mixer)) for before in plan.layers[:layer])


def _parts(mixer: MixerPlan) -> tuple[MixerPlan, ...]:
    return (mixer.attention, mixer.mamba) if isinstance(mixer, BothPlan) else (mixer,)


def _spec(mixer: MixerPlan, hidden: int) -> CacheSpec:
    if isinstance(mixer, AttentionPlan):
        return KVSpec(mixer.kv_heads, mixer.head_dim, mixer.head_dim, mixer.window, mixer.chunked)
    if isinstance(mixer, LatentPlan):
        return KVSpec(1, mixer.latent + mixer.rope.dims, mixer.latent)
    if isinstance(mixer, DeltaPlan):
        memory = mixer.value_heads, mixer.key_dim, mixer.value_dim
        return StateSpec(mixer.taps, mixer.channels, memory)
    if isinstance(mixer, MambaPlan):
        return StateSpec(mixer.taps, mixer.channels, (mixer.heads, mixer.state, mixer.head_dim))
    if isinstance(mixer, SelectivePlan):
        return StateSpec(mixer.taps, mixer.inner, (mixer.inner, mixer.state))
    assert isinstance(mixer, ConvPlan), "a mixer of two parts"
    return StateSpec(mixer.taps, hidden)
