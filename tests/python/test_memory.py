"""Peak memory grows with N, not with N^2."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch, fastpe
from fastpe import bias, mask
torch.set_num_threads(2)
kind = sys.argv[1]

def call(n):
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
    h = torch.randn(1, 2, n, requires_grad=True)
    slopes = torch.rand(2, requires_grad=True)
    kwargs = {
        "kerple": lambda: dict(bias=bias.Kerple(slopes, slopes), is_causal=True),
        "t5": lambda: dict(bias=bias.T5(torch.randn(32, 2, requires_grad=True))),
        "cable": lambda: dict(bias=bias.Cable(-torch.relu(h), torch.sigmoid(h)), is_causal=True),
        "documents": lambda: dict(
            mask=mask.documents(ids=(torch.arange(n) // 1000)) & mask.padding(torch.arange(n) < n - 5) & mask.window(2000)
        ),
    }[kind]()
    with fastpe.config.skip_bound(0.0):
        fastpe.attention(q, k, v, **kwargs).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

call(256)
start = peak()
call(2048)
middle = peak()
call(4096)
print(middle - start, peak() - start)
"""


def extra_kib(kind: str) -> tuple[int, int]:
    """What the peak rises by for a call on 2048 tokens, and for one on 4096."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    return short, long


@pytest.mark.parametrize("kind", ["kerple", "t5", "cable", "documents"])
def test_linear(kind):
    """One Nq x Nk float32 array of a head would be 64 MiB at the longer length; all tensors of the call are 5 MiB."""
    short, long = extra_kib(kind)
    assert long <= 2.5 * short + 4096, f"{short} KiB at 2048 tokens, {long} KiB at 4096"
    assert long < 40 * 1024, f"{long} KiB at 4096 tokens"
