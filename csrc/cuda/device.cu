// Questions to the CUDA runtime.
#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace fastpe::cuda {

#if defined(__CUDACC__)

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

int device_capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

#else

const char* error_text(int) { return "the emulator takes fewer than 2^31 blocks"; }
int device_capability() { return 80; }

#endif

}  // namespace fastpe::cuda
