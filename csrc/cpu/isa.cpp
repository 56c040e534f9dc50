// The table of one instruction set. Every source of FASTPE_KERNELS (CMakeLists.txt) is compiled once per set, with FASTPE_ISA
// set to its name and the flags that go with it.
#include "kernels.h"

#define FASTPE_CAT_(a, b) a##b
#define FASTPE_CAT(a, b) FASTPE_CAT_(a, b)
#define FASTPE_STR_(a) #a
#define FASTPE_STR(a) FASTPE_STR_(a)

extern const fastpe::cpu::KernelTable FASTPE_CAT(fastpe_kernels_, FASTPE_ISA);
const fastpe::cpu::KernelTable FASTPE_CAT(fastpe_kernels_, FASTPE_ISA) = {
    FASTPE_STR(FASTPE_ISA),
    fastpe::cpu::FASTPE_ISA::attn_fwd,
    fastpe::cpu::FASTPE_ISA::attn_bwd,
    fastpe::cpu::FASTPE_ISA::attn_decode,
    fastpe::cpu::FASTPE_ISA::cope_fwd,
    fastpe::cpu::FASTPE_ISA::cope_bwd,
    fastpe::cpu::FASTPE_ISA::landmark_fwd,
    fastpe::cpu::FASTPE_ISA::landmark_bwd,
    fastpe::cpu::FASTPE_ISA::attn_mass,
    fastpe::cpu::FASTPE_ISA::merge_fwd,
    fastpe::cpu::FASTPE_ISA::merge_bwd,
    fastpe::cpu::FASTPE_ISA::rotate,
    fastpe::cpu::FASTPE_ISA::rope_table,
    fastpe::cpu::FASTPE_ISA::prefix_sum,
    fastpe::cpu::FASTPE_ISA::peak_gflops,
};
