// Angles of rotary embedding and the rotation of a pair of channels, each stated once.
//
// An angle is held in turns, as a number of quarter turns plus a rest of at most 1/8 turn. A large product of position
// and frequency then costs no accuracy: its whole turns are dropped before anything is rounded, whereas the float32
// product in radians is wrong by 7e-3 at position 131072.
//
// F is float or double; V of rotate_pair may also be a SIMD vector.
#pragma once

#include "../core/hd.h"

namespace fastpe::pos {

inline constexpr double kTwoPi = 6.283185307179586476925286766559;

// A float64 number as the unevaluated sum of two float32 numbers: 48 bits of mantissa.
struct Split {
  float hi, lo;
};
FASTPE_HD Split split(double x) {
  const float hi = float(x);
  // An infinite or NaN hi carries the value alone; its difference to x would turn inf into NaN one step early.
  const double rest = x - double(hi);
  return {hi, rest == rest ? float(rest) : 0.f};
}

// Frequencies are stored in turns per position.
FASTPE_HD Split frequency_in_turns(double inv_freq) { return split(inv_freq / kTwoPi); }

template <class F>
struct Phase {
  F rest = F(0);      // turns
  F quarters = F(0);  // a whole number of quarter turns
};

// Adds x turns, |x| of any size.
template <class F>
FASTPE_HD void add_turns(Phase<F>& a, F x) {
  const F f = x - rint(x);
  const F q = rint(F(4) * f);
  a.rest = a.rest + (f - F(0.25) * q);
  a.quarters = a.quarters + q;
}

// Adds position * frequency. Whole turns are dropped from every partial product before it is rounded; only the product
// of the low parts and the rounding errors of the two middle products are always far below a turn.
FASTPE_HD void add_phase(Phase<float>& a, Split p, Split w) {
  const float x = rounded_mul(p.hi, w.hi);
  const float y = rounded_mul(p.lo, w.hi);
  const float z = rounded_mul(p.hi, w.lo);
  add_turns(a, x);
  add_turns(a, exact_fma(p.hi, w.hi, -x));
  add_turns(a, y);
  add_turns(a, z);
  a.rest = a.rest + (exact_fma(p.lo, w.hi, -y) + exact_fma(p.hi, w.lo, -z) + p.lo * w.lo);
}

// The definition, for float64 tables.
FASTPE_HD double float64_angle(double position, double inv_freq) { return position * inv_freq; }

// Adds the angle that the published checkpoints were trained with: float32 position times float32 frequency, in
// radians, rounded to float32. It is summed over axes in float32 before it comes here.
FASTPE_HD float float32_angle(double position, double inv_freq) { return rounded_mul(float(position), float(inv_freq)); }
FASTPE_HD void add_radians(Phase<float>& a, float radians) {
  // float64 keeps the float32 angle's own digits through the change of unit.
  const double t = double(radians) * (1.0 / kTwoPi);
  const double f = t - rint(t);
  const double q = rint(4.0 * f);
  a.rest = a.rest + float(f - 0.25 * q);
  a.quarters = a.quarters + float(q);
}

// cos and sin of a phase. A zero phase gives exactly 1 and 0.
FASTPE_HD void cos_sin(Phase<float> a, float& c, float& s) {
  const float n = rint(4.f * a.rest);
  const float x = a.rest - 0.25f * n;  // |x| <= 1/8
  const float q = a.quarters + n;
  const float k = q - 4.f * rint(0.25f * q);  // -2 .. 2
  const float z = x * x;
  // Taylor coefficients (2 pi)^k / k!; the first one left out is 2e-9 of the result at |x| = 1/8.
  float sp = fma(z, 42.0586939f, -76.7058597f);
  sp = fma(z, sp, 81.6052493f);
  sp = fma(z, sp, -41.3417022f);
  // 2 pi in two parts, so that the leading term is rounded once.
  const float sx = fma(x, 6.28318548f, x * (z * sp - 1.74845553e-7f));
  float cp = fma(z, -26.4262568f, 60.2446414f);
  cp = fma(z, cp, -85.4568172f);
  cp = fma(z, cp, 64.9393940f);
  cp = fma(z, cp, -19.7392088f);
  const float cx = fma(z, cp, 1.f);
  const bool odd = k == 1.f || k == -1.f;
  const float c0 = odd ? sx : cx;
  const float s0 = odd ? cx : sx;
  const bool half_turn = k == 2.f || k == -2.f;
  c = half_turn || k == 1.f ? -c0 : c0;
  s = half_turn || k == -1.f ? -s0 : s0;
}

// (x, y) := (x c - y s, x s + y c), c and s with the amplitude in them. The inverse rotation takes -s.
template <class V>
FASTPE_HD void rotate_pair(V& x, V& y, V c, V s) {
  const V r = fma(-y, s, x * c);
  y = fma(x, s, y * c);
  x = r;
}

}  // namespace fastpe::pos
