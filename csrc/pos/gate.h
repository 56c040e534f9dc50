// What gates of contextual positions (params.h: CopeParams) are made of. V is float or a SIMD vector.
#pragma once

#include "../core/hd.h"

namespace fastpe::pos {

// log2(1 + t) for 0 <= t <= 1. Polynomial of degree 8 for log2(1 + t) / t, relative error 1.6e-7: a gate that is nearly
// open adds little, and thousands of them are summed.
template <class V>
FASTPE_HD V log2_1p(V t) {
  V p = fma(V(7.54917809e-3f), t, V(-4.25670457e-2f));
  p = fma(p, t, V(1.12856167e-1f));
  p = fma(p, t, V(-1.97118947e-1f));
  p = fma(p, t, V(2.75641402e-1f));
  p = fma(p, t, V(-3.5840847e-1f));
  p = fma(p, t, V(4.80692957e-1f));
  p = fma(p, t, V(-7.21340208e-1f));
  p = fma(p, t, V(1.442695f));
  return p * t;
}

}  // namespace fastpe::pos
