// The functions one instruction set provides.
#pragma once

#include "../core/params.h"

namespace fastpe::cpu {

struct KernelTable {
  const char* isa;  // "generic", "avx2", "avx512", "avx512bf16"
  void (*attn_fwd)(const AttnParams&, const Runtime&, TileStats*);     // stats may be null
  void (*attn_bwd)(const AttnBwdParams&, const Runtime&, TileStats*);  // stats may be null
  void (*attn_decode)(const DecodeParams&, const Runtime&, TileStats*);
  void (*cope_fwd)(const CopeParams&, const Runtime&, TileStats*);
  void (*cope_bwd)(const CopeBwdParams&, const Runtime&, TileStats*);
  void (*landmark_fwd)(const LandmarkParams&, const Runtime&);
  void (*landmark_bwd)(const LandmarkBwdParams&, const Runtime&);
  void (*attn_mass)(const MassParams&, const Runtime&);
  void (*merge_fwd)(const MergeParams&, const Runtime&);
  void (*merge_bwd)(const MergeBwdParams&, const Runtime&);
  void (*rotate)(const RotateParams*, int count, const Runtime&);      // count tensors in one pass
  void (*rope_table)(const RopeTableParams&, const Runtime&);
  void (*prefix_sum)(const PrefixParams&, const Runtime&);
  double (*peak_gflops)(DType);  // one core's multiply-add rate in the arithmetic this type is computed in
};

#if defined(FASTPE_ISA)
// The same functions of the instruction set being compiled, one source file each (peak.cpp: peak_gflops).
namespace FASTPE_ISA {
void attn_fwd(const AttnParams&, const Runtime&, TileStats*);
void attn_bwd(const AttnBwdParams&, const Runtime&, TileStats*);
void attn_decode(const DecodeParams&, const Runtime&, TileStats*);
void cope_fwd(const CopeParams&, const Runtime&, TileStats*);
void cope_bwd(const CopeBwdParams&, const Runtime&, TileStats*);
void landmark_fwd(const LandmarkParams&, const Runtime&);
void landmark_bwd(const LandmarkBwdParams&, const Runtime&);
void attn_mass(const MassParams&, const Runtime&);
void merge_fwd(const MergeParams&, const Runtime&);
void merge_bwd(const MergeBwdParams&, const Runtime&);
void rotate(const RotateParams*, int count, const Runtime&);
void rope_table(const RopeTableParams&, const Runtime&);
void prefix_sum(const PrefixParams&, const Runtime&);
double peak_gflops(DType);
}  // namespace FASTPE_ISA
#endif

// The table in use: the best of this processor, or the one named by FASTPE_ISA or set_isa.
__attribute__((visibility("default"))) const KernelTable& kernels();

}  // namespace fastpe::cpu
