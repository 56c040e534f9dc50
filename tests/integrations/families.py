"""Small models of the families that transformers knows, with weights scaled up so that errors in the scores show."""

from __future__ import annotations

import copy
import functools

import torch
import transformers as T

VOCAB, LENGTH, BATCH = 90, 21, 2
WINDOW = 6

_SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
)  # fmt: skip


def _llama(**rope):
    return T.LlamaForCausalLM, T.LlamaConfig(**_SIZES, rope_parameters={"rope_theta": 1e4, **rope})


def _sizes(*without: str, **more):
    return {k: v for k, v in _SIZES.items() if k not in without} | more


# Name -> what makes (model class, config).
ROPE = {
    "llama": lambda: _llama(rope_type="default"),
    "llama_linear": lambda: _llama(rope_type="linear", factor=2.0),
    "llama_dynamic": lambda: (
        T.LlamaForCausalLM,
        T.LlamaConfig(**_sizes(max_position_embeddings=16), rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}),
    ),
    "llama_yarn": lambda: _llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "llama_longrope": lambda: _llama(
        rope_type="longrope", factor=4.0, original_max_position_embeddings=32, short_factor=[1.0] * 8, long_factor=[2.0] * 8
    ),
    "llama_llama3": lambda: _llama(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "llama_proportional": lambda: _llama(rope_type="proportional", partial_rotary_factor=0.5),
    "mistral": lambda: (T.MistralForCausalLM, T.MistralConfig(**_SIZES, sliding_window=WINDOW)),
    "phi3": lambda: (T.Phi3ForCausalLM, T.Phi3Config(**_SIZES, sliding_window=WINDOW)),
    "phi3_longrope": lambda: (
        T.Phi3ForCausalLM,
        T.Phi3Config(
            **_SIZES, original_max_position_embeddings=32,
            rope_parameters={"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        ),
    ),
    "smollm3": lambda: (T.SmolLM3ForCausalLM, T.SmolLM3Config(**_SIZES)),
    "qwen2": lambda: (T.Qwen2ForCausalLM, T.Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": lambda: (T.Qwen3ForCausalLM, T.Qwen3Config(**_SIZES, head_dim=16)),
    "gpt_neox": lambda: (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**_sizes("num_key_value_heads"), rotary_pct=0.5)),
    "cohere": lambda: (T.CohereForCausalLM, T.CohereConfig(**_SIZES)),
    "gemma2": lambda: (
        T.Gemma2ForCausalLM, T.Gemma2Config(**_SIZES, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=3.0, query_pre_attn_scalar=4)
    ),
    "gemma3": lambda: (
        T.Gemma3ForCausalLM,
        T.Gemma3TextConfig(
            **_SIZES, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=4, layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
            },
        ),
    ),
    "gpt_oss": lambda: (
        T.GptOssForCausalLM,
        T.GptOssConfig(
            **_SIZES, head_dim=16, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ),
    "llama4": lambda: (
        T.Llama4ForCausalLM,
        T.Llama4TextConfig(
            **_SIZES, intermediate_size_mlp=48, head_dim=16, attention_chunk_size=WINDOW, num_local_experts=2,
            layer_types=["chunked_attention", "full_attention"],
        ),
    ),
    "deepseek_v3": lambda: (
        T.DeepseekV3ForCausalLM,
        T.DeepseekV3Config(
            **_sizes("num_key_value_heads"), num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=24,
        ),
    ),
    "qwen2_vl": lambda: (
        T.Qwen2VLForConditionalGeneration,
        T.Qwen2VLConfig(
            text_config=_sizes(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 3, 3]}),
            vision_config=dict(depth=1, embed_dim=16, hidden_size=64, num_heads=2, in_channels=3, patch_size=4),
            image_token_id=80, video_token_id=81, vision_start_token_id=82, vision_end_token_id=83,
        ),
    ),
}  # fmt: skip
ENCODERS = {
    "modernbert": lambda: (
        T.ModernBertForMaskedLM,
        T.ModernBertConfig(
            **_sizes("num_key_value_heads"), local_attention=2 * WINDOW, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
        ),
    ),
    "bert": lambda: (T.BertForMaskedLM, T.BertConfig(**_sizes("num_key_value_heads"), hidden_dropout_prob=0, attention_probs_dropout_prob=0)),
}  # fmt: skip
TABLES = {
    "t5": lambda: (T.T5ForConditionalGeneration, T.T5Config(**_T5)),
    "mt5": lambda: (T.MT5ForConditionalGeneration, T.MT5Config(**_T5)),
    "umt5": lambda: (T.UMT5ForConditionalGeneration, T.UMT5Config(**_T5)),
    "longt5": lambda: (T.LongT5ForConditionalGeneration, T.LongT5Config(**_T5, local_radius=4)),
}
# Families that never look an implementation up: `patch` alone makes them call.
PATCHED = {
    "mpt": lambda: (
        T.MptForCausalLM,
        T.MptConfig(
            vocab_size=VOCAB, d_model=64, n_heads=4, n_layers=2, expansion_ratio=1, max_seq_len=128, attn_config={"alibi_bias_max": 4}, pad_token_id=0
        ),
    ),
    "bloom": lambda: (T.BloomForCausalLM, T.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=None)),
    "bloom_6_heads": lambda: (T.BloomForCausalLM, T.BloomConfig(vocab_size=VOCAB, hidden_size=96, n_layer=2, n_head=6, pad_token_id=0, eos_token_id=None)),
    "falcon": lambda: (T.FalconForCausalLM, T.FalconConfig(**_falcon(), new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_multi_query": lambda: (T.FalconForCausalLM, T.FalconConfig(**_falcon(), multi_query=True)),
    "falcon_alibi": lambda: (T.FalconForCausalLM, T.FalconConfig(**_falcon(), alibi=True, multi_query=False)),
    "gptj": lambda: (T.GPTJForCausalLM, T.GPTJConfig(**_gpt())),
    "codegen": lambda: (T.CodeGenForCausalLM, T.CodeGenConfig(**_gpt())),
}  # fmt: skip


def _falcon():
    return dict(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip


def _gpt():
    return dict(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=128, n_inner=48, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip


FAMILIES = ROPE | ENCODERS | TABLES | PATCHED


def build(name: str, dtype: torch.dtype = torch.float32):
    """A new eager model in eval mode: matrices 4 times the size of their initialisation, sinks and tables of size 1.

    With the default initialisation Bloom's logits move by 1e-5 for an error of 5 % in the scores.
    """
    cls, config = FAMILIES[name]()
    torch.manual_seed(0)
    # Falcon's eager attention adds ALiBi twice (once in its mask) in release 5.23; its "sdpa" is the published model.
    model = cls._from_config(config, attn_implementation="sdpa" if name == "falcon_alibi" else "eager").to(dtype).eval()
    with torch.no_grad():
        for what, p in model.named_parameters():
            if "sinks" in what or "relative_attention_bias" in what:
                p.normal_()
            elif p.dim() > 1 and not name.endswith("t5"):
                p.mul_(4)
    return model


@functools.cache
def _eager(name: str):
    return build(name)


def eager(name: str):
    """The eager model of a family, shared by the tests of a module: none may change it."""
    return _eager(name.removesuffix("_patched"))


def twin(name: str):
    """A copy of `eager(name)`."""
    return copy.deepcopy(eager(name))


def has_decoder(name: str) -> bool:
    """Encoder and decoder, which take decoder_input_ids."""
    return name.removesuffix("_patched") in TABLES


def forget(model):
    """Dynamic NTK in transformers keeps the frequencies of the longest text it has seen."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq.copy_(module.original_inv_freq)
    return model


def tokens(seed: int = 0, length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padding(pads=(5, 0), length: int = LENGTH) -> torch.Tensor:
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def close(got: torch.Tensor, want: torch.Tensor, factor: float = 2e-5) -> None:
    """Within `factor` of the largest entry."""
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs().max().item()
    assert torch.isfinite(got).all() and error <= factor * want.abs().max().item(), (error, want.abs().max().item())
