"""Feed-forward layers: gated ones, plain ones, and mixtures of gated experts."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rl_mlx.model.layers import FusedLinear, Linear, Matrix, SplitLinear, activated, gated
from rl_mlx.model.plan import Activation, MLPPlan, MoEPlan, RouterPlan

# From this many token-expert pairs on sorting by expert pays: each matrix is read once.
_SORT_FROM = 64


class PlainMLP:
    """``down(f(up(x)))``."""

    def __init__(self, plan: MLPPlan, up: Linear, down: Linear) -> None:
        self._activation: Activation = plan.activation
        self._up = up
        self._down = down

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        return self._down(activated(self._activation, self._up(x)))


class MLP:
    """``down(f(gate(x)) * up(x))``."""

    def __init__(self, plan: MLPPlan, gate_up: FusedLinear | SplitLinear, down: Linear) -> None:
        self._activation: Activation = plan.activation
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        gate, up = self._gate_up(x)
        return self._down(gated(self._activation, gate, up))


class ExpertLinear:
    """One linear layer an expert, ``[experts, out, in]``."""

    def __init__(self, matrix: Matrix, bias: mx.array | None) -> None:
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """``x`` ``[..., 1, in]`` through the expert named in ``experts`` ``[...]``."""
        y = self.matrix.gather(x, experts, ordered=ordered)
        return y if self.bias is None else y + self.bias[experts][..., None, :]


class Router:
    """Which experts answer for a token, and how much each of them counts."""

    def __init__(self, plan: RouterPlan, linear: Linear, correction: mx.array | None) -> None:
        """``correction`` ``[experts]`` is added to scores for the choice alone."""
        self._plan = plan
        self._linear = linear
        self._correction = correction

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts and their weights, both ``[B, S, active]``, of ``[B, S, hidden]``."""
        p = self._plan
        logits = self._linear(x).astype(mx.float32)
        scores = mx.softmax(logits, axis=-1) if p.score == "softmax" else mx.sigmoid(logits)
        ranks = scores if self._correction is None else scores + self._correction
        if p.active_groups < p.groups:
            ranks = self._of_best_groups(ranks)
        experts = mx.argpartition(-ranks, kth=p.active - 1, axis=-1)[..., : p.active]
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if p.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return experts, weights * p.scale

    def _of_best_groups(self, ranks: mx.array) -> mx.array:
        """``ranks``, where experts of other groups come last."""
        p = self._plan
        grouped = ranks.reshape(*ranks.shape[:-1], p.groups, -1)
        best = mx.topk(grouped, p.group_best, axis=-1).sum(axis=-1)
        limit = mx.topk(best, p.active_groups, axis=-1).min(axis=-1, keepdims=True)
        kept = (best >= limit)[..., None]
        return mx.where(kept, grouped, mx.array(-mx.inf, ranks.dtype)).reshape(ranks.shape)


class SharedExpert:
    """A feed-forward layer that answers for every token, as much as its gate says."""

    def __init__(self, mlp: MLP | PlainMLP, gate: Linear | None) -> None:
        self._mlp = mlp
        self._gate = gate

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        y = self._mlp(x)
        return y if self._gate is None else y * mx.sigmoid(self._gate(x))


class MoE:
    """Mixture of experts (Shazeer et al. 2017)."""

    def __init__(
        self,
        plan: MoEPlan,
        router: Router,
        experts: Sequence[ExpertLinear],
        shared: SharedExpert | None,
    ) -> None:
        """``experts`` are their gates, ups and downs."""
        self._plan = plan
        self._router = router
        self._gate, self._up, self._down = experts
        self._shared = shared

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        experts, weights = self._router(x)
        weights = weights[..., None].astype(x.dtype)
        if self._plan.weigh_inputs:
            y = self._mix(x[..., None, :] * weights, experts).sum(axis=-2)
        else:
            y = (self._mix(x[..., None, :], experts) * weights).sum(axis=-2)
        return y if self._shared is None else y + self._shared(x)

    def _mix(self, x: mx.array, experts: mx.array) -> mx.array:
        """Every chosen expert's answer, ``[B, S, active, hidden]``, to its input ``[B, S, active,
        hidden]`` or to one for all, ``[B, S, 1, hidden]``.
        """
        if experts.size < _SORT_FROM:
            return self._ffn(x[..., None, :], experts, ordered=False).squeeze(-2)
        flat = experts.flatten()
        order = mx.argsort(flat)
        rows = x.reshape(-1, 1, x.shape[-1])[order // (experts.shape[-1] // x.shape[-2])]
        y = self._ffn(rows, flat[order], ordered=True)[mx.argsort(order)]
        return y.reshape(*experts.shape, -1)

    def _ffn(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        gate = self._gate(x, experts, ordered=ordered)
        up = self._up(x, experts, ordered=ordered)
        return self._down(gated(self._plan.activation, gate, up), experts, ordered=ordered)
