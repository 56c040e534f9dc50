// torch.ops.fastpe.
#include <torch/csrc/stable/library.h>

#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastpe, m) { fastpe::binding::define_ops(m); }
