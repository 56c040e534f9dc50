// fastpe_emu_tests: the emulator's options and counters, the conformance kernels and the planted mistakes, for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "cuda/conformance.cuh"
#include "cuda/launch.cuh"
#include "emu/emu.h"
#include "planted.h"
#include "planted_sm90.h"

namespace py = pybind11;
using namespace fastpe;

namespace {

// An array that ends where an inaccessible page begins.
template <class T>
struct Guarded {
  size_t n;
  T* p;
  explicit Guarded(size_t count) : n(count), p(static_cast<T*>(emu::guarded_alloc(count * sizeof(T)))) {}
  Guarded(const T* from, size_t count) : Guarded(count) { std::memcpy(p, from, n * sizeof(T)); }
  Guarded(const Guarded&) = delete;
  ~Guarded() { emu::guarded_free(p, n * sizeof(T)); }
};

void set_options(const std::string& schedule, const std::string& copies, uint64_t seed, int workers) {
  emu::Options o;
  if (schedule == "fifo") o.schedule = emu::Schedule::fifo;
  else if (schedule == "reverse") o.schedule = emu::Schedule::reverse;
  else if (schedule == "random") o.schedule = emu::Schedule::random;
  else if (schedule == "greedy") o.schedule = emu::Schedule::greedy;
  else throw py::value_error("schedule must be fifo, reverse, random or greedy, got " + schedule);
  if (copies == "late") o.copies = emu::CopyTiming::late;
  else if (copies == "early") o.copies = emu::CopyTiming::early;
  else if (copies == "random") o.copies = emu::CopyTiming::random;
  else throw py::value_error("copies must be late, early or random, got " + copies);
  o.seed = seed;
  o.workers = workers;
  emu::options() = o;
}

py::dict counters(bool reset) {
  const emu::Counters c = emu::read_counters(reset);
  py::dict d;
  d["blocks"] = c.blocks;
  d["mma"] = c.mma;
  d["ldmatrix"] = c.ldmatrix;
  d["cp_async"] = c.cp_async;
  d["barriers"] = c.barriers;
  d["extra_wavefronts"] = c.extra_wavefronts;
  return d;
}

// n bytes in front of an inaccessible page.
py::array_t<uint8_t> guarded(size_t n) {
  auto* g = new Guarded<uint8_t>(n);
  return py::array_t<uint8_t>(py::ssize_t(n), g->p, py::capsule(g, [](void* p) { delete static_cast<Guarded<uint8_t>*>(p); }));
}

// run(kernel, blocks, threads, shared bytes, arguments) -> whether it ran the kernel; None: the emulator runs all.
py::object& python_runner() {
  static auto* r = new py::object(py::none());
  return *r;
}
void set_runner(py::object run) {
  python_runner() = run;
  emu::other_runner() = run.is_none() ? nullptr : +[](const char* kernel, uint32_t blocks, uint32_t threads, uint32_t shared, const void* args, size_t bytes) {
    py::gil_scoped_acquire gil;
    return python_runner()(kernel, blocks, threads, shared, py::bytes(static_cast<const char*>(args), bytes)).cast<bool>();
  };
}

using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// Calls f(name, run, words in, words out) for every conformance kernel; run(in, out) returns 0 or an error.
template <class Fn>
void for_each_conformance(Fn&& f) {
  cuda::conformance::for_each([&](const char* name, auto kernel, uint32_t threads, uint32_t shared, int64_t words_in, int64_t words_out) {
    f(name, [=](const uint32_t* in, uint32_t* out) { return cuda::launch(kernel, name, 1, threads, shared, nullptr, cuda::conformance::Args{in, out}); }, words_in, words_out);
  });
  const auto sm90 = [&](const char* name, auto kernel, uint32_t threads, uint32_t shared, int64_t words_in, int64_t words_out, auto fill) {
    f(name, [=](const uint32_t* in, uint32_t* out) {
      cuda::conformance::Sm90Args a{};
      a.in = in, a.out = out;
      const int rc = fill(a);
      return rc ? rc : cuda::launch(kernel, name, 1, threads, shared, nullptr, a);
    }, words_in, words_out);
  };
  cuda::conformance::for_each_sm90(sm90);
  sm90("product_sm90", &planted_sm90::product_kernel<0>, 256, planted_sm90::kSmemBytes, planted_sm90::kWordsIn, planted_sm90::kWordsOut, planted_sm90::fill);
}

Words conformance_run(const std::string& name, Words in) {
  Words result;
  bool found = false;
  for_each_conformance([&](const char* n, auto run, int64_t words_in, int64_t words_out) {
    if (name != n) return;
    found = true;
    if (in.size() != words_in) throw py::value_error(name + " takes " + std::to_string(words_in) + " words");
    Guarded<uint32_t> a(in.data(), size_t(words_in)), b{size_t(words_out)};
    if (const int rc = run(a.p, b.p)) throw py::value_error(name + ": error " + std::to_string(rc));
    result = Words(words_out);
    std::memcpy(result.mutable_data(), b.p, size_t(words_out) * 4);
  });
  if (!found) throw py::value_error("no conformance kernel " + name);
  return result;
}

std::vector<std::string> conformance_names() {
  std::vector<std::string> names;
  for_each_conformance([&](const char* n, auto&&...) { names.push_back(n); });
  return names;
}

using Halves = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

template <int kBug>
bool run_planted(int bug, const planted::Args& a) {
  if (bug == kBug) cuda::launch(&planted::kernel<kBug>, "planted", 1, 64, planted::kSmemBytes, nullptr, a);
  if constexpr (kBug + 1 < planted::kBugs) return bug == kBug || run_planted<kBug + 1>(bug, a);
  return bug == kBug;
}

py::array_t<float> planted_run(int bug, Halves q, Halves k) {
  const size_t nq = size_t(q.shape(0)), nk = size_t(k.shape(0));
  Guarded<uint16_t> gq(q.data(), nq * 16), gk(k.data(), nk * 16);
  Guarded<float> out(nq);
  if (!run_planted<0>(bug, {gq.p, gk.p, out.p, uint32_t(nq), uint32_t(nk)})) throw py::value_error("no such bug");
  py::array_t<float> r{py::ssize_t(nq)};
  std::memcpy(r.mutable_data(), out.p, nq * 4);
  return r;
}

template <int kBug>
bool run_planted_sm90(int bug, const cuda::conformance::Sm90Args& a) {
  if (bug == kBug) cuda::launch(&planted_sm90::product_kernel<kBug>, "product", 1, 256, planted_sm90::kSmemBytes, nullptr, a);
  if constexpr (kBug + 1 < planted_sm90::kBugs) return bug == kBug || run_planted_sm90<kBug + 1>(bug, a);
  return bug == kBug;
}

// in: A and B; the words of C.
Words planted_sm90_run(int bug, Words in) {
  if (in.size() != planted_sm90::kWordsIn) throw py::value_error("takes " + std::to_string(planted_sm90::kWordsIn) + " words");
  Guarded<uint32_t> x(in.data(), size_t(in.size())), y{size_t(planted_sm90::kWordsOut)};
  cuda::conformance::Sm90Args a{};
  a.in = x.p, a.out = y.p;
  if (planted_sm90::fill(a)) throw py::value_error("no tensor map");
  if (!run_planted_sm90<0>(bug, a)) throw py::value_error("no such bug");
  Words r{py::ssize_t(planted_sm90::kWordsOut)};
  std::memcpy(r.mutable_data(), y.p, size_t(planted_sm90::kWordsOut) * 4);
  return r;
}

}  // namespace

PYBIND11_MODULE(fastpe_emu_tests, m) {
  m.def("set_options", &set_options, py::arg("schedule") = "fifo", py::arg("copies") = "late", py::arg("seed") = 1, py::arg("workers") = 2);
  m.def("counters", &counters, py::arg("reset") = true);
  m.def("guarded", &guarded);
  m.def("set_runner", &set_runner);
  m.def("conformance", &conformance_run);
  m.def("conformance_names", &conformance_names);
  m.def("planted", &planted_run);
  m.def("planted_sm90", &planted_sm90_run);
}
