// Starts a kernel: on the GPU, or in the emulator under g++. The only host code of the kernels that differs, with
// device.cu.
#pragma once

#include <cstdint>
#include <cstdio>

#include "ptx.cuh"

namespace fastpe::cuda {

#if defined(__CUDACC__)

// Returns a cudaError_t, 0 when the launch was accepted.
template <class Args>
int launch(void (*kernel)(Args), const char* name, int64_t blocks, uint32_t threads, uint32_t shared_bytes, void* stream, const Args& args) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  if (shared_bytes > 48 * 1024)
    if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes))) return int(e);
  kernel<<<uint32_t(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  return int(cudaGetLastError());
}

#else

template <class Args>
int launch(void (*kernel)(Args), const char* name, int64_t blocks, uint32_t threads, uint32_t shared_bytes, void* stream, const Args& args) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return 1;
  if (emu::other_runner() && emu::other_runner()(name, uint32_t(blocks), threads, shared_bytes, &args, sizeof(Args))) return 0;
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  emu::run_grid(name, {uint32_t(blocks), 1, 1}, threads, shared_bytes, [](const void* c) {
    const Call& x = *static_cast<const Call*>(c);
    x.kernel(*x.args);
  }, &call);
  return 0;
}

#endif

}  // namespace fastpe::cuda
