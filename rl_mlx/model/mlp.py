"""Feed-forward layers: gated ones, plain ones, and mixtures of gated experts."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import FusedLinear, Linear, Matrix, SplitLinear, activated, gated
from rl_mlx.model.plan import Activation, MLPPlan, MoEPlan

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


class MoE:
    """Mixture of experts: a router picks ``active`` of them for each token."""

    def __init__(
        self,
        plan: MoEPlan,
        router: Linear,
        gate: ExpertLinear,
        up: ExpertLinear,
        down: ExpertLinear,
    ) -> None:
        self._plan = plan
        self._router = router
        self._gate, self._up, self._down = gate, up, down

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        active = self._plan.active
        scores = self._router(x)
        experts = mx.argpartition(-scores, kth=active - 1, axis=-1)[..., :active]
        if self._plan.normalize:
            chosen = mx.take_along_axis(scores, experts, axis=-1)
            weights = mx.softmax(chosen, axis=-1, precise=True)
        else:
            weights = mx.take_along_axis(
                mx.softmax(scores, axis=-1, precise=True), experts, axis=-1
            )
        y = self._mix(x, experts)
        return (y * weights[..., None].astype(y.dtype)).sum(axis=-2)

    def _mix(self, x: mx.array, experts: mx.array) -> mx.array:
        """Every chosen expert's answer, ``[B, S, active, hidden]``."""
        if experts.size < _SORT_FROM:
            return self._ffn(x[..., None, None, :], experts, ordered=False).squeeze(-2)
        flat = experts.flatten()
        order = mx.argsort(flat)
        rows = x.reshape(-1, 1, x.shape[-1])[order // experts.shape[-1]]
        y = self._ffn(rows, flat[order], ordered=True)[mx.argsort(order)]
        return y.reshape(*experts.shape, -1)

    def _ffn(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        gate = self._gate(x, experts, ordered=ordered)
        up = self._up(x, experts, ordered=ordered)
        return self._down(gated(self._plan.activation, gate, up), experts, ordered=ordered)
