"""Mistakes planted in a small kernel (planted.h): the emulator has to name every one of them, or the numbers have to
show it, whatever order the threads run in."""

import itertools

import numpy as np
import pytest
import torch

SCHEDULES = ("fifo", "reverse", "random", "greedy")

# Bug number: what the report says; None: only the numbers show it.
BUGS = {
    1: "race on shared byte|before the cp.async",  # no barrier after the wait
    2: "race on shared byte|under way",  # no barrier before the refill
    3: "before the cp.async issued at planted.h",  # no wait
    4: None,  # wrong B fragment
    5: "mask|diverged|deadlock",  # shuffle in a branch
    6: None,  # no key mask
    7: "outside every tensor",  # reads past the end
    8: "race on shared byte",  # no warp barrier
    9: "race on shared byte",  # no named barrier
    10: "nobody waited",  # an arrival too many
    11: "deadlock.*has ended",  # early return
    12: "ended without waiting",  # copy not waited for
    13: "ended with a cp.async that was never committed|before the cp.async",  # copy not committed
    14: "not aligned",  # address
    15: "outside the block's",  # address
    16: "diverged: barrier",  # two barriers in one warp
    17: "diverged|deadlock",  # half a warp
    18: "diverged: shfl.sync",  # another call
    19: "race on shared byte",  # two writers
    20: "others came with|race on shared byte",  # thread counts differ
}


@pytest.fixture
def inputs():
    # 70 keys: the last tile is ragged. All products negative, so that a zero-filled key would win.
    rng = np.random.default_rng(3)
    q, k = rng.integers(1, 5, (13, 16)).astype(np.float32), -rng.integers(1, 5, (70, 16)).astype(np.float32)

    def half(x):
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)

    return half(q), half(k), (q @ k.T).max(1)


@pytest.mark.parametrize("schedule,copies", list(itertools.product(SCHEDULES, ("late", "early", "random"))))
def test_the_correct_kernel_passes(emu, inputs, schedule, copies):
    q, k, want = inputs
    emu.set_options(schedule, copies, seed=11)
    emu.counters()
    np.testing.assert_array_equal(emu.planted(0, q, k), want)
    counted = emu.counters()
    assert counted["extra_wavefronts"] == 0 and counted["mma"] == 2 * 3 * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(emu, inputs, bug, schedule):
    q, k, want = inputs
    emu.set_options(schedule, seed=bug)
    if BUGS[bug] is None:
        assert not np.array_equal(emu.planted(bug, q, k), want)
    else:
        with pytest.raises(RuntimeError, match=BUGS[bug]) as e:
            emu.planted(bug, q, k)
        assert "planted.h:" in str(e.value) and "block (0,0,0)" in str(e.value)


def test_early_delivery_hides_nothing_from_the_order_check(emu, inputs):
    emu.set_options("fifo", "early")
    with pytest.raises(RuntimeError, match="before the cp.async"):
        emu.planted(3, *inputs[:2])


def test_a_failed_launch_leaves_the_next_one_alone(emu, inputs):
    q, k, want = inputs
    for bug in (3, 7, 11):
        with pytest.raises(RuntimeError):
            emu.planted(bug, q, k)
        np.testing.assert_array_equal(emu.planted(0, q, k), want)
