// The AVX-512 intrinsics of the CPU kernels one by one, for test_avx512.py: compiled with csrc/emu/avx512.h before it, or for a
// processor that has them.
#include <immintrin.h>

#include <cstdint>

namespace {
__m512 load(const float* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
__m512i load(const int32_t* p) { return _mm512_loadu_si512(p); }
void store(void* p, __m512 v) { _mm512_storeu_si512(p, _mm512_castps_si512(v)); }
}  // namespace

extern "C" {
// r: 16 floats; a, b, c: 16 floats
void op_fmadd(float* r, const float* a, const float* b, const float* c) { store(r, _mm512_fmadd_ps(load(a), load(b), load(c))); }
void op_max(float* r, const float* a, const float* b, const float*) { store(r, _mm512_max_ps(load(a), load(b))); }
void op_sqrt(float* r, const float* a, const float*, const float*) { store(r, _mm512_sqrt_ps(load(a))); }
void op_reduce(float* r, const float* a, const float*, const float*) { store(r, _mm512_reduce_ps(load(a), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)); }
void op_scalef(float* r, const float* a, const float* b, const float*) { store(r, _mm512_scalef_ps(load(a), load(b))); }
void op_sums(float* r, const float* a, const float*, const float*) { r[0] = _mm512_reduce_add_ps(load(a)), r[1] = _mm512_reduce_max_ps(load(a)); }
void op_round(float* r, const float* a, const float*, const float*) { store(r, _mm512_castsi512_ps(_mm512_cvttps_epi32(load(a)))); }
void op_dot(float* r, const float* a, const float* b, const float* c) {
  store(r, _mm512_dpbf16_ps(load(c), (__m512bh)_mm512_castps_si512(load(a)), (__m512bh)_mm512_castps_si512(load(b))));
}
void op_to_bf16(float* r, const float* a, const float* b, const float*) { _mm512_storeu_si512(r, (__m512i)_mm512_cvtne2ps_pbh(load(b), load(a))); }
void op_to_bf16_one(float* r, const float* a, const float*, const float*) { _mm256_storeu_si256((__m256i*)r, (__m256i)_mm512_cvtneps_pbh(load(a))); }
void op_half(float* r, const float* a, const float*, const float*) { store(r, _mm512_cvtph_ps(_mm512_cvtps_ph(load(a), _MM_FROUND_TO_NEAREST_INT))); }
void op_widen(float* r, const float* a, const float*, const float*) { _mm512_storeu_si512(r, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_castps_si512(load(a))))); }
void op_zip(float* r, const float* a, const float* b, const float*) {
  const __m512i x = _mm512_castps_si512(load(a)), y = _mm512_castps_si512(load(b));
  _mm512_storeu_si512(r, _mm512_unpacklo_epi16(x, y)), _mm512_storeu_si512(r + 16, _mm512_unpackhi_epi16(x, y));
}
void op_permute(float* r, const float* a, const float* b, const int32_t* at) {
  const __m512i x = _mm512_castps_si512(load(a)), y = _mm512_castps_si512(load(b)), i = load(at);
  store(r, _mm512_permutex2var_ps(load(a), i, load(b)));
  _mm512_storeu_si512(r + 16, _mm512_permutexvar_epi16(i, x)), _mm512_storeu_si512(r + 32, _mm512_permutex2var_epi16(x, i, y));
}
void op_masks(int32_t* r, const int32_t* a, const int32_t* b, const int32_t* m) {
  const __m512i x = load(a), y = load(b);
  r[0] = _mm512_movepi32_mask(x), r[1] = _mm512_movepi64_mask(x), r[2] = _mm512_test_epi32_mask(x, y);
  r[3] = _mm512_mask_cmpneq_epi32_mask(__mmask16(m[0]), x, y);
  r[4] = _mm512_cmp_ps_mask(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), _CMP_UNORD_Q);
  _mm512_storeu_si512(r + 16, _mm512_mask_or_epi32(x, __mmask16(m[0]), y, _mm512_set1_epi32(m[1])));
  store(r + 32, _mm512_mask_mov_ps(_mm512_castsi512_ps(x), __mmask16(m[0]), _mm512_castsi512_ps(y)));
  store(r + 48, _mm512_maskz_mov_ps(__mmask16(m[0]), _mm512_castsi512_ps(y)));
}
void op_whole(int32_t* r, const int32_t* a, const int32_t* b, const int32_t*) {
  const __m512i x = load(a), y = load(b);
  _mm512_storeu_si512(r, _mm512_add_epi32(x, y)), _mm512_storeu_si512(r + 16, _mm512_sub_epi32(x, y));
  _mm512_storeu_si512(r + 32, _mm512_and_si512(x, y)), _mm512_storeu_si512(r + 48, _mm512_or_si512(x, y));
  _mm512_storeu_si512(r + 64, _mm512_slli_epi32(x, 16)), _mm512_storeu_si512(r + 80, _mm512_srli_epi32(x, 16));
}
// at: 16 places in a table of 64 floats
void op_gather(float* r, const float* table, const float* x, const int32_t* at) {
  store(r, _mm512_i32gather_ps(load(at), table, 4));
  _mm512_mask_i32scatter_ps(r + 16, 0x5a3c, load(at), load(x), 4);
}
void op_insert(float* r, const float* a, const float* b, const float*) {
  store(r, _mm512_insertf32x8(load(a), _mm512_castps512_ps256(load(b)), 1));
  store(r + 16, _mm512_insertf32x4(load(a), _mm_loadu_ps(b), 2));
  _mm256_storeu_si256((__m256i*)(r + 32), _mm512_extracti64x4_epi64(_mm512_castps_si512(load(a)), 1));
}
}
