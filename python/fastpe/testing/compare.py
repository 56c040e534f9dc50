"""How results are compared.

Infinities and NaNs must stand in the same places; then the largest error counts, relative to the largest entry of what
was expected. Half precision is held to twice the error plain torch makes in the same dtype.
"""

from __future__ import annotations

import torch

from .. import reference

Tensor = torch.Tensor

# Relative to the largest entry: forward, backward.
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 1e-4)}


def error(got: Tensor, want: Tensor, *, floor: float = 0.0) -> float:
    """The largest error relative to the largest finite entry of `want` (at least `floor`).

    Raises:
        AssertionError: shapes differ, or NaN or infinities stand in different places.
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    for what, where in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = where(got) != where(want)
        assert not wrong.any(), f"{what} at other places: {int(wrong.sum())} of {wrong.numel()} entries"
    finite = torch.isfinite(want)
    if not finite.any():
        return 0.0
    difference = (got - want)[finite].abs().max()
    return float(difference / want[finite].abs().max().clamp(min=max(floor, 1e-300)))


def close(what: str, got: Tensor, want: Tensor, tolerance: float, *, floor: float = 0.0) -> None:
    """Asserts error(got, want) <= tolerance."""
    e = error(got, want, floor=floor)
    assert e <= tolerance, f"{what}: error {e:.3g} of the largest entry, allowed {tolerance:.3g}"


def close_half(
    what: str,
    got: Tensor,
    want: Tensor,
    torch_result: Tensor,
    *,
    floor: float = 0.0,
    dtype: torch.dtype | None = None,
    drawn: bool = False,
) -> None:
    """Asserts that the error is at most twice that of plain torch in the same dtype, plus 1e-5.

    With `dtype`, torch's own error counts as at least one rounding to it: where few numbers are summed, how well the
    rounding errors of torch happen to cancel says nothing. With `drawn`, for one of many random cases, the largest error
    may reach three times torch's where the root mean square keeps the rule: the largest of a few hundred roundings
    scatters by more than the margin. Of fewer than 64 numbers not even the mean says much: two roundings then count.
    """
    e, own = error(got, want, floor=floor), error(torch_result, want, floor=floor)
    if dtype is not None:
        own = max(own, torch.finfo(dtype).eps * (1 if drawn and want.numel() < 64 else 0.5))
    if drawn and want.numel() >= 64 and 2 * own + 1e-5 < e <= 3 * own + 1e-5:
        finite = torch.isfinite(want)
        square, torch_square = (float((x.detach().double() - want)[finite].square().sum()) for x in (got, torch_result))
        assert square <= 4 * torch_square, f"{what}: root mean square error {(square / torch_square) ** 0.5:.3g} times torch's own"
        return
    assert e <= 2 * own + 1e-5, f"{what}: error {e:.3g} of the largest entry, torch's own is {own:.3g}"


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope=None,
    bias=None,
    mask=None,
    region=None,
    positions=None,
    key_positions=None,
    scale=None,
    head_scale=None,
    row_scale=None,
    softcap=None,
    softcap_includes_bias=False,
    temperature=None,
    sink=None,
    is_causal=False,
    return_lse=False,
):
    """`fastpe.attention` as dense torch code in the inputs' dtype, with a float32 softmax: the yardstick of half precision."""
    dtype = query.dtype
    q, k, factor, b, visible, tau, region_of = reference.dense_parts(
        query if rope is None else query.double(), key if rope is None else key.double(),
        value if rope is None else value.double(),
        rope=rope, bias=bias, mask=mask, region=region, positions=positions, key_positions=key_positions, scale=scale,
        head_scale=head_scale, row_scale=row_scale, temperature=temperature, is_causal=is_causal,
    )  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def to(x):
        return None if x is None else x.to(wide)

    def narrow(x):
        return tuple(y.to(dtype) for y in x) if isinstance(x, tuple) else x.to(dtype)

    return reference.softmax_attention(
        narrow(q), narrow(k), value, to(factor), to(b), visible, softcap=softcap, softcap_includes_bias=softcap_includes_bias,
        temperature=to(tau), sink=to(sink), region_of=region_of, return_lse=return_lse, softmax_dtype=wide,
    )  # fmt: skip
