// fastpe._C: build facts, the choice of instruction set, tile counters, and the functions of csrc/pos for tests.
// Knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "core/params.h"
#include "core/tiles.h"
#include "cpu/dispatch.h"
#include "pos/bias.h"
#include "pos/rotate.h"
#include "pos/visible.h"

namespace py = pybind11;
using namespace fastpe;

namespace {

py::dict build_info() {
  py::dict d;
  d["version"] = FASTPE_VERSION;
  d["compiler"] = FASTPE_COMPILER;
  d["stable_abi"] = FASTPE_STABLE_ABI;
  d["isas"] = cpu::built_isas();
  // "80 90a-real": the word before the dash of each.
  std::vector<std::string> architectures;
  std::istringstream built(FASTPE_CUDA_BUILT);
  for (std::string word; built >> word;) architectures.push_back(word.substr(0, word.find('-')));
  d["cuda_architectures"] = architectures;
  return d;
}

py::dict tile_stats() {
  const TileStats s = cpu::read_tile_stats();
  py::dict d;
  d["visited"] = s.visited;
  d["hidden"] = s.hidden;
  d["decayed"] = s.decayed;
  d["block_q"] = s.block_q;
  d["block_k"] = s.block_k;
  return d;
}

py::dict scratch_use() {
  const cpu::ScratchUse u = cpu::scratch_use();
  py::dict d;
  d["kept"] = u.kept;
  d["lent"] = u.lent;
  return d;
}

py::tuple phase(double position, double inv_freq) {
  pos::Phase<float> a;
  pos::add_phase(a, pos::split(position), pos::frequency_in_turns(inv_freq));
  return py::make_tuple(a.rest, a.quarters);
}

py::tuple cos_sin(double position, double inv_freq, bool float32_product) {
  pos::Phase<float> a;
  if (float32_product)
    pos::add_radians(a, pos::float32_angle(position, inv_freq));
  else
    pos::add_phase(a, pos::split(position), pos::frequency_in_turns(inv_freq));
  float c, s;
  pos::cos_sin(a, c, s);
  return py::make_tuple(c, s);
}

py::tuple rotate_pair(double x, double y, double c, double s) {
  pos::rotate_pair(x, y, c, s);
  return py::make_tuple(x, y);
}

// The tiles of one forward call, as far as indices decide: ids, masks and decaying biases hide more of them.
py::dict tile_plan(int64_t B, int64_t H, int64_t Hk, int64_t Nq, int64_t Nk, const std::string& dtype, int64_t left, int64_t right, int64_t sinks) {
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16" && dtype != "float64") throw py::value_error("fastpe._C.tile_plan: dtype '" + dtype + "' is not float32, bfloat16, float16 or float64");
  if (B < 0 || H < 0 || Hk < 1 || Nq < 0 || Nk < 0) throw py::value_error("fastpe._C.tile_plan: sizes must not be negative and Hk at least 1");
  const std::string isa = cpu::current_isa();
  const bool bf16_dot = dtype == "bfloat16" && isa == "avx512bf16";
  const bool few = Nq >= 1 && Nq <= tiles::kFewQueries;
  const int64_t bq = few ? Nq : tiles::kBlockQ, bk = few ? tiles::kDecodeKeys : tiles::block_k(bf16_dot);
  const int64_t query_blocks = tiles::ceil_div(Nq, bq), key_tiles = tiles::ceil_div(Nk, bk);
  const pos::Band band{left, right, sinks};
  int64_t visited = 0;
  for (int64_t i = 0; i < Nq; i += bq)
    for (int64_t j = 0; j < Nk; j += bk) {
      const int64_t I0 = i + Nk - Nq, I1 = I0 + (Nq - i < bq ? Nq - i : bq);
      const pos::Range r = pos::keys_in_tile(band, I0, I1, j, j + bk < Nk ? j + bk : Nk);
      visited += r.lo < r.hi;
    }
  py::dict d;
  d["isa"] = isa;
  d["product"] = dtype == "float64" ? "float64" : bf16_dot ? "bfloat16 pairs" : "float32";
  d["block_q"] = bq;
  d["block_k"] = bk;
  d["visited"] = B * H * visited;
  d["hidden"] = B * H * (query_blocks * key_tiles - visited);
  d["backward_splits"] = tiles::backward_splits(B * Hk, query_blocks);
  return d;
}

BiasForm form_of(const std::string& name) {
#define FASTPE_BIAS_FORM(form, id, text) \
  if (name == #form) return BiasForm(id);
#include "pos/bias_forms.def"
#undef FASTPE_BIAS_FORM
  throw py::value_error("fastpe._C: '" + name + "' is not a bias form");
}

py::dict bias_forms() {
  py::dict d;
#define FASTPE_BIAS_FORM(form, id, text) d[#form] = py::make_tuple(id, text);
#include "pos/bias_forms.def"
#undef FASTPE_BIAS_FORM
  return d;
}

// Value at D, derivative in D and in the two parameters, without the row weight.
template <class S>
py::tuple bias_value(const std::string& form, S d, S p0, S p1) {
  const BiasForm f = form_of(form);
  if (!pos::is_rel_fn(f)) throw py::value_error("fastpe._C: '" + form + "' is not a function of a distance");
  py::tuple r;
  pos::with_form(f, [&](auto phi) {
    using P = decltype(phi);
    r = py::make_tuple(P::value(d, p0, p1), P::slope(d, p0, p1), P::d_p0(d, p0, p1), P::d_p1(d, p0, p1));
  });
  return r;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, instruction set, tile counters and position functions of fastpe. Internal: use fastpe.info().";

  m.def("build_info", &build_info, "What was compiled in, as a dict.");
  m.def(
      "peak_gflops",
      [](const std::string& dtype) {
        if (dtype != "fp32" && dtype != "bf16" && dtype != "fp64")
          throw py::value_error("fastpe._C.peak_gflops: dtype must be fp32, bf16 or fp64, got " + dtype);
        return cpu::kernels().peak_gflops(dtype == "fp32" ? DType::f32 : dtype == "bf16" ? DType::bf16 : DType::f64);
      },
      "One core's multiply-add rate in GFLOP/s in the arithmetic the given type is computed in.", py::arg("dtype"));
  m.def("available_isas", &cpu::available_isas, "Instruction sets built in and present in this processor, the best first.");
  m.def("current_isa", &cpu::current_isa, "The instruction set in use.");
  m.def("set_isa", &cpu::set_isa, py::arg("name"), "Use another instruction set from now on. ValueError names the available ones.");

  m.def("set_tile_stats", &cpu::set_tile_stats, py::arg("on"), "Switch the tile counters of attention calls on or off.");
  m.def("tile_stats", &tile_stats, "Tiles visited, hidden (no visible pair) and decayed (skipped under skip_eps) since the last reset; tile sizes of the last call.");
  m.def("reset_tile_stats", &cpu::reset_tile_stats, "Set the tile counters to zero.");

  m.def("tile_plan", &tile_plan, py::arg("B"), py::arg("H"), py::arg("Hk"), py::arg("Nq"), py::arg("Nk"), py::arg("dtype") = "float32", py::arg("left") = 0,
        py::arg("right") = 0, py::arg("sinks") = 0,
        "Kernel, tile sizes and the numbers of tiles that indices make visible or hidden in a forward call; the parts a backward call is cut into.");

  m.def("scratch_use", &scratch_use, "Bytes of scratch memory kept for the next call and lent to running ones.");
  m.def("scratch_trim", &cpu::scratch_trim, "Give the kept scratch memory back.");
  m.def(
      "ask_for_huge_pages", [](uintptr_t address, size_t bytes) { cpu::ask_for_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"), "Ask the system to hold this memory in huge pages where it covers whole ones.");

  m.def("phase", &phase, py::arg("position"), py::arg("inv_freq"), "Angle as (rest in turns, quarter turns).");
  m.def("cos_sin", &cos_sin, py::arg("position"), py::arg("inv_freq"), py::arg("float32_product") = false, "(cos, sin) of one angle, float32.");
  m.def("rotate_pair", &rotate_pair, py::arg("x"), py::arg("y"), py::arg("c"), py::arg("s"), "(x c - y s, x s + y c).");
  m.def("bias_forms", &bias_forms, "Name -> (id, formula).");
  m.def("bias_value", &bias_value<double>, py::arg("form"), py::arg("d"), py::arg("p0") = 0.0, py::arg("p1") = 0.0,
        "(value, d/dD, d/dp0, d/dp1) of a form at the distance d, float64.");
  m.def("bias_value_f32", &bias_value<float>, py::arg("form"), py::arg("d"), py::arg("p0") = 0.0f, py::arg("p1") = 0.0f, "The same in float32.");
  m.def(
      "table_index", [](const std::string& form, int64_t t, int64_t length) { return pos::table_index(form_of(form), t, length); },
      py::arg("form"), py::arg("t"), py::arg("length"), "Index into a table form for t = I - j.");
  m.def(
      "visible", [](int64_t I, int64_t j, int64_t left, int64_t right, int64_t sinks) { return pos::visible({left, right, sinks}, I, j); },
      py::arg("I"), py::arg("j"), py::arg("left") = 0, py::arg("right") = 0, py::arg("sinks") = 0, "Whether row I sees key j, as far as indices go.");

  // Fails the import, in words, when FASTPE_ISA names what is not there.
  cpu::current_isa();
}
