// The functions one instruction set provides. One object per ISA exports one such table and nothing else.
#pragma once

#include "../core/params.h"

namespace fastpe::cpu {

struct KernelTable {
  const char* isa;  // "generic", "avx2", "avx512", "avx512bf16"
  void (*attn_fwd)(const AttnParams&, const Runtime&, TileStats*);     // stats may be null
  void (*attn_bwd)(const AttnBwdParams&, const Runtime&, TileStats*);  // stats may be null
  void (*cope_fwd)(const CopeParams&, const Runtime&, TileStats*);
  void (*cope_bwd)(const CopeBwdParams&, const Runtime&, TileStats*);
  void (*rotate)(const RotateParams*, int count, const Runtime&);      // count tensors in one pass
  void (*rope_table)(const RopeTableParams&, const Runtime&);
  void (*prefix_sum)(const PrefixParams&, const Runtime&);
  double (*peak_gflops)(DType);  // one core's multiply-add rate in the arithmetic this type is computed in
};

// The table in use: the best of this processor, or the one named by FASTPE_ISA or set_isa.
__attribute__((visibility("default"))) const KernelTable& kernels();

}  // namespace fastpe::cpu
