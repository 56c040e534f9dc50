// Host and device from one source.
//
// FASTPE_HD marks a function that both compilers take. It is always inlined: the same header is compiled once per
// instruction set, and a function emitted out of line would let the linker pick, say, the AVX-512 copy for everybody.
//
// Below it, the scalar functions that position code calls by unqualified name; a SIMD vector brings its own of the
// same names (cpu/simd.h).
#pragma once

#if defined(__CUDACC__)
#define FASTPE_HD __host__ __device__ __forceinline__
#else
#define FASTPE_HD inline __attribute__((always_inline))
#endif

namespace fastpe {

// a * b + c with one rounding.
FASTPE_HD float exact_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTPE_HD double exact_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

// a * b, rounded, even where the compiler may fuse a product with a later sum.
#if defined(__CUDA_ARCH__)
FASTPE_HD float rounded_mul(float a, float b) { return __fmul_rn(a, b); }
#else
FASTPE_HD float rounded_mul(float a, float b) { return a * b; }
#endif

// a * b + c, with one rounding where the processor does that as fast.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
FASTPE_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTPE_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
FASTPE_HD float fma(float a, float b, float c) { return a * b + c; }
FASTPE_HD double fma(double a, double b, double c) { return a * b + c; }
#endif

FASTPE_HD float rint(float x) { return __builtin_rintf(x); }
FASTPE_HD double rint(double x) { return __builtin_rint(x); }
FASTPE_HD float abs(float x) { return __builtin_fabsf(x); }
FASTPE_HD double abs(double x) { return __builtin_fabs(x); }
// max and min give b when a is NaN or b is NaN.
FASTPE_HD float max(float a, float b) { return a > b ? a : b; }
FASTPE_HD double max(double a, double b) { return a > b ? a : b; }
FASTPE_HD float min(float a, float b) { return a < b ? a : b; }
FASTPE_HD double min(double a, double b) { return a < b ? a : b; }
FASTPE_HD float log(float x) { return __builtin_logf(x); }
FASTPE_HD double log(double x) { return __builtin_log(x); }
FASTPE_HD float log1p(float x) { return __builtin_log1pf(x); }
FASTPE_HD double log1p(double x) { return __builtin_log1p(x); }
FASTPE_HD float pow(float x, float y) { return __builtin_powf(x, y); }
FASTPE_HD double pow(double x, double y) { return __builtin_pow(x, y); }
FASTPE_HD float select(bool m, float a, float b) { return m ? a : b; }
FASTPE_HD double select(bool m, double a, double b) { return m ? a : b; }

}  // namespace fastpe
