"""Peak memory grows with N, not with N^2."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, fastpe
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
        # An entry for every offset, of queries and of keys.
        "relative_key_query": lambda: dict(bias=bias.relative_key(q, torch.randn(2 * n - 1, 16, requires_grad=True), key=k)),
        "transformer_xl": lambda: dict(bias=bias.transformer_xl(q, k, torch.randn(n, 2, 16, requires_grad=True), *(torch.zeros(2, 16, requires_grad=True),) * 2), is_causal=True),
        "fire": lambda: dict(bias=fastpe.nn.FireBias(2)(), is_causal=True),
        "forget_both_sides": lambda: dict(bias=bias.Forget(-torch.relu(h), future_log_gates=-torch.relu(h))),
        "cable": lambda: dict(bias=bias.Cable(-torch.relu(h), torch.sigmoid(h)), is_causal=True),
        "documents": lambda: dict(
            mask=mask.documents(ids=(torch.arange(n) // 1000)) & mask.padding(torch.arange(n) < n - 5) & mask.window(2000)
        ),
    }[kind]()
    with fastpe.config.skip_bound(0.0):
        fastpe.attention(q, k, v, **kwargs).sum().backward()

def memory(what):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(what))

call(256)
# From here on the peak is that of the calls, not of the imports.
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
start = memory("VmRSS")
call(2048)
middle = memory("VmHWM")
call(4096)
print(middle - start, memory("VmHWM") - start)
"""


def extra_kib(kind: str) -> tuple[int, int]:
    """What the peak rises by for a call on 2048 tokens, and for one on 4096."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    return short, long


@pytest.mark.parametrize("kind", ["kerple", "t5", "cable", "documents", "relative_key_query", "transformer_xl", "fire", "forget_both_sides"])
def test_linear(kind):
    """One Nq x Nk float32 array of a head would be 64 MiB at the longer length; all tensors of the call are 5 MiB. What the
    first, short call left in place comes off both figures, hence the constant."""
    short, long = extra_kib(kind)
    assert long <= 2.5 * short + 10 * 1024, f"{short} KiB at 2048 tokens, {long} KiB at 4096"
    # An entry for every pair and head would be 256 MiB and more for each table.
    assert long < (96 if kind in ("relative_key_query", "transformer_xl") else 40) * 1024, f"{long} KiB at 4096 tokens"
