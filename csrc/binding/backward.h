// What every backward pass of attention is given beside the forward pass's own arguments.
#pragma once

#include "args.h"

namespace fastpe::binding {

// Gradients of out and lse, and the forward pass's results, checked and put into b (b.d_o, b.dlse) and p (p.o, p.lse,
// p.residual). Autograd hands gradients over in any layout, expanded ones among them: copies live as long as this does, and on
// a GPU the allocator keeps them until the stream has used them.
class BackwardInputs {
 public:
  template <class Params>
  BackwardInputs(const Call& c, AttnParams& p, Params& b, const Tensor& dout, const OptTensor& dlse, const Tensor& out, const Tensor& lse, const OptTensor& residual = {}) {
    const auto like_out = [&](const char* name, const Tensor& t) {
      check_device(c, name, t);
      check_dtype(c, name, t, c.lead.scalar_type());
      check_shape(c, name, t, {{p.B}, {p.H}, {p.Nq}, {p.Dv}});
    };
    const auto like_lse = [&](const char* name, const Tensor& t) {
      check_device(c, name, t);
      check_dtype(c, name, t, aux_type(p.dtype));
      check_shape(c, name, t, {{p.B}, {p.H}, {p.Nq}});
    };
    like_out("dout", dout);
    like_out("out", out);
    like_lse("lse", lse);
    d_o_ = dout.stride(3) == 1 ? dout : torch::stable::contiguous(dout);
    b.d_o = read_view(c, "dout", *d_o_);
    p.o = read_view(c, "out", out);
    lse_ = torch::stable::contiguous(lse);
    p.lse = read_ptr(*lse_);
    if (residual) {
      like_out("residual", *residual);
      p.residual = read_view(c, "residual", *residual);
    }
    if (dlse) {
      like_lse("dlse", *dlse);
      dlse_ = torch::stable::contiguous(*dlse);
      b.dlse = dlse_->const_data_ptr();
    }
  }

 private:
  OptTensor d_o_, lse_, dlse_;
};

}  // namespace fastpe::binding
