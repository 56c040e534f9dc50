// The conformance kernels on a GPU: fastpe_conformance_count, _name and _run, called through ctypes.
#include <cstring>

#include "cuda/conformance.cuh"
#include "cuda/launch.cuh"
#include "../emu/planted_sm90.h"

using namespace fastpe::cuda;

// Calls f(name, run, words in, words out) for every kernel; run(in, out) returns a cudaError_t.
template <class Fn>
static void for_each(Fn&& f) {
  conformance::for_each([&](const char* name, auto kernel, uint32_t threads, uint32_t shared, int64_t takes, int64_t gives) {
    f(name, [=](const uint32_t* in, uint32_t* out) { return launch(kernel, name, 1, threads, shared, nullptr, conformance::Args{in, out}); }, takes, gives);
  });
  const auto sm90 = [&](const char* name, auto kernel, uint32_t threads, uint32_t shared, int64_t takes, int64_t gives, auto fill) {
    f(name, [=](const uint32_t* in, uint32_t* out) {
      conformance::Sm90Args a{};
      a.in = in, a.out = out;
      const int rc = fill(a);
      return rc ? rc : launch(kernel, name, 1, threads, shared, nullptr, a);
    }, takes, gives);
  };
  conformance::for_each_sm90(sm90);
  sm90("product_sm90", &fastpe::planted_sm90::product_kernel<0>, 256, fastpe::planted_sm90::kSmemBytes, fastpe::planted_sm90::kWordsIn, fastpe::planted_sm90::kWordsOut, fastpe::planted_sm90::fill);
}

#define FASTPE_EXPORT extern "C" __attribute__((visibility("default")))

FASTPE_EXPORT int fastpe_conformance_count() {
  int n = 0;
  for_each([&](auto&&...) { ++n; });
  return n;
}

FASTPE_EXPORT const char* fastpe_conformance_name(int i) {
  const char* found = nullptr;
  for_each([&](const char* name, auto&&...) {
    if (i-- == 0) found = name;
  });
  return found;
}

// Words out, or minus a cudaError_t; -10000: no such kernel, -10001: not the words it takes. Waits for the result.
FASTPE_EXPORT int fastpe_conformance_run(const char* name, const uint32_t* in, int words_in, uint32_t* out, int room) {
  int result = -10000;
  for_each([&](const char* n, auto run, int64_t takes, int64_t gives) {
    if (std::strcmp(n, name) != 0) return;
    if (takes != words_in || gives > room) {
      result = -10001;
      return;
    }
    uint32_t *a = nullptr, *b = nullptr;
    int rc = cudaMalloc(&a, size_t(takes) * 4);
    if (!rc) rc = cudaMalloc(&b, size_t(gives) * 4);
    if (!rc) rc = cudaMemcpy(a, in, size_t(takes) * 4, cudaMemcpyHostToDevice);
    if (!rc) rc = cudaMemset(b, 0xFF, size_t(gives) * 4);
    if (!rc) rc = run(a, b);
    if (!rc) rc = cudaMemcpy(out, b, size_t(gives) * 4, cudaMemcpyDeviceToHost);
    cudaFree(a);
    cudaFree(b);
    result = rc ? -rc : int(gives);
  });
  return result;
}
