"""Rotary embeddings: one builder per published rule, each returning a `Rope`.

Every builder takes ``layout`` ("half": channels (j, j + R/2) form pair j, as in LLaMA, NeoX and Qwen; "interleaved":
channels (2j, 2j + 1), as in GPT-J and RoFormer) and ``precision`` ("exact", or "float32" to reproduce what checkpoints
trained with float32 angles compute). R is ``rotary_dim``, the number of channels that turn; R/2 is the number of pairs.
"""

from ._rope import Rope
from ._rope_hf import from_hf_config
from ._rope_rules import (
    BASE_BOUND, BUCKET_BASES, HARPE_BASES, attention_buckets, attention_waveform, axial, base_bound, clex,
    context_of_base, cosine_sum, default, dynamic_linear, dynamic_ntk, entropy_abf_scale, floor_log_scale, giraffe,
    harpe, harpe_bases, hirope, learned, linear, llama3, log_n_scale, longrope, lrpe, mix_buckets, mixed,
    mixed_init, mrope, mrope_axes, ms_poe, ms_poe_outliers, ms_poe_ratios, ntk, ntk_by_parts, proportional, xpos,
    yarn, yarn_mscale,
)

__all__ = [
    "Rope", "default", "linear", "dynamic_linear", "ntk", "dynamic_ntk", "ntk_by_parts", "yarn", "yarn_mscale",
    "longrope", "llama3", "proportional", "clex", "giraffe", "harpe", "harpe_bases", "HARPE_BASES", "ms_poe",
    "ms_poe_ratios", "ms_poe_outliers", "xpos", "axial", "mixed", "mixed_init", "mrope", "mrope_axes", "hirope",
    "lrpe", "attention_buckets", "mix_buckets", "BUCKET_BASES", "learned", "from_hf_config", "base_bound",
    "BASE_BOUND", "cosine_sum", "context_of_base", "attention_waveform", "entropy_abf_scale", "log_n_scale",
    "floor_log_scale",
]
