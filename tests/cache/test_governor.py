"""The governor: who may take memory, and what is set on the device."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.cache.governor import Governor, MLXDevice
from rl_mlx.errors import OutOfMemory


class Device:
    """Remembers its limits."""

    limits = (7, 8)

    def capacity(self):
        return 1000

    def share(self):
        return 0.5

    def set_limits(self, wired, cached):
        before, self.limits = self.limits, (wired, cached)
        return before


def test_weights_that_do_not_fit_are_refused_with_the_numbers():
    governor = Governor(Device(), budget=int(4e9), weights=int(5e9), scratch=int(1e9))
    with pytest.raises(OutOfMemory, match=r"needs 5.0 GB .* 1.0 GB to work; the budget is 4.0 GB"):
        governor.check_weights("big")
    Governor(Device(), budget=10, weights=9, scratch=1).check_weights("small")


def test_limits_are_put_back():
    device = Device()
    put_back = Governor(device, budget=1000, weights=0).limit_device()
    assert device.limits == (1000, 50)
    put_back()
    assert device.limits == (7, 8)


@given(
    budget=st.integers(0, 100), weights=st.integers(0, 60), scratch=st.integers(0, 30),
    arena=st.integers(0, 120), tree=st.integers(0, 80),
    pinned=st.integers(0, 80),
)  # fmt: skip
def test_what_is_granted_fits(budget, weights, scratch, arena, tree, pinned):
    governor = Governor(Device(), budget, weights, scratch)
    left = [tree]

    def evict(limit):
        left[0] = max(min(left[0], limit), min(pinned, left[0]))
        return left[0]

    granted = governor.make_room(arena, tree, evict)
    if granted and arena + left[0] > 0:
        assert weights + scratch + arena + left[0] <= budget
    if not granted:
        assert arena + min(pinned, tree) > governor.room
    if arena + tree <= governor.room:
        assert left[0] == tree, "nothing is evicted without need"


def test_the_cpu_has_the_ram_it_is_told_of():
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("this device has memory of its own")
    device = MLXDevice(ram=1 << 34)
    assert device.capacity() == 1 << 34
    assert device.share() == 0.75
    before = device.set_limits(0, 1 << 20)
    assert device.set_limits(*before) == (0, 1 << 20)
