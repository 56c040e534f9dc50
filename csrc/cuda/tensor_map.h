// Tensor maps on the host: what a bulk copy knows of the tensor it moves tiles of.
#pragma once

#include <cstdint>

#include "ptx_sm90.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace fastpe::cuda {

// Up to three dimensions, innermost first and dense. A tile is a box of them.
struct TensorView {
  const void* base;                  // a multiple of 16
  uint32_t rank;                     // 2 or 3
  uint32_t element;                  // bytes: 2 or 4
  uint64_t dims[3], strides[2];      // elements; bytes from one row, one matrix to the next, multiples of 16
  uint32_t box[3];                   // at most 256 each; the innermost a multiple of 16 bytes, at most the swizzle's
  Swizzle swizzle;
};

inline bool describable(const TensorView& v) {
  if (v.rank < 2 || v.rank > 3 || (v.element != 2 && v.element != 4) || reinterpret_cast<uintptr_t>(v.base) % 16) return false;
  for (uint32_t i = 0; i < v.rank; ++i)
    if (v.dims[i] == 0 || v.dims[i] > uint64_t(1) << 32 || v.box[i] == 0 || v.box[i] > 256) return false;
  for (uint32_t i = 0; i + 1 < v.rank; ++i)
    if (v.strides[i] % 16 || v.strides[i] >= uint64_t(1) << 40) return false;
  const uint32_t inner = v.box[0] * v.element, span[] = {inner, 32, 64, 128};
  return inner % 16 == 0 && inner <= span[uint32_t(v.swizzle)];
}

// 0, or a cudaError_t.
inline int make_tensor_map(TensorMap& map, const TensorView& v) {
#if defined(__CUDACC__)
  if (!describable(v)) return int(cudaErrorInvalidValue);
  // Through the runtime, so that nothing links against the driver's library.
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(e == cudaSuccess && found == cudaDriverEntryPointSuccess ? f : nullptr);
  }();
  if (!encode) return int(cudaErrorNotSupported);
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint64_t dims[3] = {v.dims[0], v.dims[1], v.dims[2]}, strides[2] = {v.strides[0], v.strides[1]};
  const cuuint32_t box[3] = {v.box[0], v.box[1], v.box[2]}, steps[3] = {1, 1, 1};
  const CUresult rc = encode(reinterpret_cast<CUtensorMap*>(&map), v.element == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32, v.rank,
                             const_cast<void*>(v.base), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(v.swizzle),
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return rc == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
#else
  if (!describable(v)) return 1;
  map = TensorMap{};
  map.magic = TensorMap::kMagic;
  map.base = static_cast<uint8_t*>(const_cast<void*>(v.base));
  map.rank = v.rank, map.element = v.element, map.swizzle = uint32_t(v.swizzle);
  for (uint32_t i = 0; i < v.rank; ++i) map.dims[i] = v.dims[i], map.box[i] = v.box[i];
  for (uint32_t i = 0; i + 1 < v.rank; ++i) map.strides[i] = v.strides[i];
  return 0;
#endif
}

}  // namespace fastpe::cuda
