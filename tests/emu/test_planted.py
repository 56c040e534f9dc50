"""Mistakes planted in small kernels (planted.h, planted_sm90.h): the emulator has to name every one of them, or the numbers have to
show it, whatever order the threads run in."""

import itertools

import conformance_sm90
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


# The same for the product on mbarriers, bulk copies and wgmma.
BUGS_SM90 = {
    1: "before the bulk copy|race on shared byte",  # fewer bytes expected than come
    2: "deadlock.*0 of 1 arrivals and 8192 bytes are missing",  # more bytes expected than come
    3: "one arrival more|under way|race on shared byte",  # no wait for an empty stage
    4: "before the bulk copy|race on shared byte",  # no wait for a full stage
    5: "before the bulk copy|race on shared byte",  # wrong parity
    6: "without waiting for its wgmma|race on shared byte|before the bulk copy",  # no wgmma wait
    7: None,  # wrong stride in a descriptor
    8: "a bulk store reads shared byte .* no fence.proxy.async since",
    9: "race on shared byte",  # no named barrier
    10: "no fence.mbarrier_init",
    11: "no mbarrier is initialised|not ordered after the mbarrier's initialisation",  # no barrier after it
    12: "without a wgmma.fence",
    13: "race on shared byte|before the bulk copy",  # stage given back before the wait
    14: "was written before the wait",  # accumulator
    15: None,  # accumulator read before the wait
    16: "diverged: wgmma|diverged: .*wgmma",  # one warp of four
    17: "disagree on a descriptor",
    18: "deadlock.* waits in setmaxnreg",  # one warp of four
    19: "setmaxnreg of 480 registers",
    20: "without waiting for its bulk store",
    21: "bulk store that was never committed",
    22: "race on shared byte .* the bulk copy issued at planted_sm90.h",  # reuse before the store has read
    23: "not aligned to 1024 bytes",  # tile
    24: "no mbarrier is initialised",
    25: "one arrival more",
    26: "belongs to the mbarrier",  # ordinary store on it
    27: "nobody waited for the bulk copy",
    28: "is not of a 128-byte swizzle",
    29: "race on shared byte|before the bulk copy|without waiting for its wgmma",  # a group fewer waited for
}


@pytest.fixture
def product():
    return conformance_sm90.product_inputs(np.random.default_rng(4))


@pytest.mark.parametrize("schedule,copies", list(itertools.product(SCHEDULES, ("late", "early", "random"))))
def test_the_correct_product_passes(emu, product, schedule, copies):
    words, want = product
    for seed in range(3):
        emu.set_options(schedule, copies, seed=seed)
        np.testing.assert_array_equal(emu.planted_sm90(0, words).view(np.uint16).reshape(want.shape), want)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS_SM90)
def test_planted_bugs_of_sm90_are_caught(emu, product, bug, schedule):
    words, want = product
    emu.set_options(schedule, seed=bug)
    if BUGS_SM90[bug] is None:
        assert not np.array_equal(emu.planted_sm90(bug, words).view(np.uint16).reshape(want.shape), want)
    else:
        with pytest.raises(RuntimeError, match=BUGS_SM90[bug]) as e:
            emu.planted_sm90(bug, words)
        assert "planted_sm90.h:" in str(e.value) and "block (0,0,0)" in str(e.value)


@pytest.mark.parametrize("bug", [1, 4, 5, 13])
def test_early_bulk_copies_hide_nothing_from_the_order_check(emu, product, bug):
    emu.set_options("fifo", "early")
    with pytest.raises(RuntimeError, match="race on shared byte|before the bulk copy"):
        emu.planted_sm90(bug, product[0])
