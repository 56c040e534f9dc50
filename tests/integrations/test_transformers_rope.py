"""Rotation of transformers models through fastpe, and stock RoPE models turned into others."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import families as F
import transformers as T

import fastpe
import fastpe.integrations.transformers as hf
from fastpe import region as R

T.logging.set_verbosity_error()

TURNING = [*F.ROPE, "falcon", "falcon_multi_query", "gptj", "codegen", "modernbert"]
# Rotation inside the call is refused, and why.
OUTSIDE = {
    "deepseek_v3": "turns 8 of 24 channels",
    "llama4": "position_ids",
    "qwen2_vl": "one position a token",
    "gptj": "config",
    "codegen": "config",
    "modernbert": "config",
}


def refused(call, error, *said: str):
    with pytest.raises(error) as caught:
        call()
    for text in said:
        assert text in str(caught.value), str(caught.value)


def generate(model, new: int = 9, **more):
    return model.generate(max_new_tokens=new, do_sample=False, pad_token_id=0, **more)


def check(model, name: str) -> None:
    eager = F.eager(name)
    real = F.left_padding()
    with torch.no_grad():
        F.close(F.forget(model)(F.tokens()).logits, F.forget(eager)(F.tokens()).logits)
        got, want = (F.forget(m)(F.tokens(), attention_mask=real).logits[real.bool()] for m in (model, eager))
        F.close(got, want)


@pytest.mark.parametrize("name", TURNING)
def test_rotation_as_an_op(name):
    model = hf.patch(F.twin(name), rope="op")
    check(model, name)
    if name not in F.ENCODERS:
        given = {"input_ids": F.tokens(), "attention_mask": F.left_padding()}
        assert torch.equal(generate(F.forget(model), **given), generate(F.forget(F.eager(name)), **given))


@pytest.mark.parametrize("name", TURNING)
def test_rotation_inside_the_call(name):
    model = F.twin(name)
    if name in OUTSIDE:
        refused(lambda: hf.patch(model, rope="fused")(F.tokens()), NotImplementedError, "Attention", "rope='fused'", OUTSIDE[name])
        return
    hf.patch(model, rope="fused")
    check(model, name)
    given = {"input_ids": F.tokens(), "attention_mask": F.left_padding()}
    if name == "llama_dynamic":  # eager caches keys turned by frequencies that hold no longer: see test_dynamic_ntk
        return
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, **given, **cache), generate(F.eager(name), **given, **cache))


@pytest.mark.parametrize("rope", ["op", "fused"])
def test_gradients_and_other_positions(rope):
    positions = torch.cat([torch.arange(8), torch.arange(30, 43)])[None]
    given = {"input_ids": F.tokens(), "position_ids": positions, "labels": F.tokens(1), "use_cache": False}
    models = F.twin("llama"), hf.patch(F.twin("llama"), rope=rope)
    for model in models:
        model(**given).loss.backward()
    for (what, want), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        F.close(got.grad, want.grad, 1e-4), what


def test_gaps_with_a_cache_are_refused():
    model = hf.patch(F.twin("llama"), rope="fused")
    positions = torch.cat([torch.arange(8), torch.arange(30, 43)])[None]
    refused(lambda: model(F.tokens(), position_ids=positions, use_cache=True), ValueError, "LlamaAttention", "position_ids", "use_cache")


def test_other_models_of_the_process_stay():
    hf.patch(F.twin("llama"), rope="op")
    other = F.build("llama")
    with torch.no_grad():
        assert torch.equal(other(F.tokens()).logits, F.eager("llama")(F.tokens()).logits)


def test_copies_of_a_patched_model():
    model = hf.patch(F.twin("llama"), region=R.self_extend(6, 3))
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(F.tokens()).logits
        hf.unpatch(model)
        assert torch.equal(other(F.tokens()).logits, want)


def test_unpatch():
    model = hf.patch(F.twin("llama"), scaling={"rope_type": "yarn", "factor": 4.0}, bias=fastpe.bias.Alibi(4))
    hf.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(F.tokens()).logits, F.eager("llama")(F.tokens()).logits)


def test_fullgraph():
    torch._dynamo.reset()
    model = hf.patch(F.twin("llama"), rope="fused")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        F.close(compiled(F.tokens(), use_cache=False).logits, F.eager("llama")(F.tokens()).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Other frequencies


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama_linear", {"rope_type": "linear", "factor": 2.0}),
        ("llama_yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("llama_yarn", fastpe.rope.yarn(16, 4.0, 32)),
        ("llama_llama3", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    ],
)
def test_scaling_equals_a_model_configured_so(name, scaling):
    model = hf.patch(F.twin("llama"), scaling=scaling)
    given = {"input_ids": F.tokens(), "attention_mask": F.left_padding()}
    with torch.no_grad():
        want = F.eager(name)(F.tokens()).logits
        assert not torch.allclose(want, F.eager("llama")(F.tokens()).logits, atol=1e-2)
        F.close(model(F.tokens()).logits, want)
    assert torch.equal(generate(model, **given), generate(F.eager(name), **given))


def test_scaling_leaves_windows_alone():
    model = hf.patch(F.twin("gemma3"), scaling={"rope_type": "yarn", "factor": 4.0})
    assert [layer.self_attn.sliding_window is None for layer in model.model.layers] == [False, True]
    assert [layer.self_attn._fastpe.rope.name for layer in model.model.layers] == ["default", "yarn"]
    refused(lambda: hf.patch(F.twin("mistral"), region=R.rerope(4)), NotImplementedError, "MistralForCausalLM", "sliding window")


def test_dynamic_ntk():
    """With a cache the tokens are those of a model that reads the whole text anew at every step.

    One layer: the inputs of later ones keep what earlier steps' frequencies made of them, with any cache.
    """
    cls, config = F.FAMILIES["llama"]()
    config.max_position_embeddings, config.num_hidden_layers = 16, 1
    torch.manual_seed(0)
    stock = cls._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(4)
    config = copy.deepcopy(config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    anew = cls._from_config(config, attn_implementation="eager").eval()
    anew.load_state_dict(stock.state_dict())
    ids = F.tokens(batch=1)
    got = generate(hf.patch(stock, scaling={"rope_type": "dynamic", "factor": 2.0}), 12, input_ids=ids)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, F.forget(anew)(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)
    assert not torch.equal(generate(F.forget(anew), 12, input_ids=ids[:, : F.LENGTH]), ids), "the stock model's cache would do as well"


def test_entropy_abf():
    first, length = 1, 5

    def scaled(module, query, key, value, mask, **more):
        p = torch.arange(query.shape[2])
        factor = ((p + 1.0).log() / torch.tensor(float(length)).log()).clamp(min=1) if module.layer_idx >= first else torch.ones(len(p))
        return T.models.llama.modeling_llama.eager_attention_forward(module, query * factor[:, None], key, value, mask, **more)

    T.AttentionInterface.register("scaled_eager", scaled)
    T.AttentionMaskInterface.register("scaled_eager", T.masking_utils.eager_mask)
    cls, config = F.FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    want = cls._from_config(config, attn_implementation="scaled_eager").eval()
    want.load_state_dict(F.eager("llama").state_dict())
    model = hf.patch(F.twin("llama"), scaling=hf.EntropyABF(5e5, length, first))
    with torch.no_grad():
        F.close(model(F.tokens()).logits, want(F.tokens()).logits)
    ids = F.tokens()
    assert torch.equal(generate(model, input_ids=ids), generate(model, input_ids=ids, use_cache=False))


def test_attention_buckets():
    bases = (1e4, 2e4, 5e4)
    rows = []
    for base in bases:
        cls, config = F.FAMILIES["llama"]()
        config.rope_parameters = {"rope_type": "default", "rope_theta": base}
        one = cls._from_config(config, attn_implementation="eager").eval()
        one.load_state_dict(F.eager("llama").state_dict())
        with torch.no_grad():
            rows.append(one(F.tokens(batch=1)).logits[0])
    rows = torch.stack(rows)
    weights = rows.amax(-1).softmax(0)
    model = hf.patch(F.twin("llama"), scaling=hf.AttentionBuckets(bases))
    ids = F.tokens(batch=1)
    with torch.no_grad():
        F.close(model(ids).logits[0], (weights[..., None] * rows).sum(0))
    assert torch.equal(generate(model, input_ids=ids), generate(model, input_ids=ids, use_cache=False))
    refused(lambda: model(F.tokens()), NotImplementedError, "LlamaForCausalLM", "AttentionBuckets")


def by_definition(monkeypatch):
    """Attention calls of patched models through the dense float64 definition."""
    from fastpe.integrations import _hf_rope

    def dense(query, *args, **more):
        return fastpe.reference.attention(query, *args, **more).to(query.dtype)

    monkeypatch.setattr(_hf_rope, "attention", dense)


def test_ms_poe(monkeypatch):
    model = hf.patch(F.twin("llama"), scaling=hf.MsPoE(assignment="code", first_layer=0))
    ids = F.tokens(batch=1)
    with torch.no_grad():
        got = model(ids).logits
        attention = model.model.layers[0].self_attn
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        q, k = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
        p = (q[:, :, -1:] @ k.repeat_interleave(2, 1).mT / 4).softmax(-1)[0, :, 0]
        share = (p > 3 * p.mean(-1, keepdim=True)).double().mean(-1)
        order = share.argsort(descending=True, stable=True)
        assert torch.allclose(attention._fastpe_ratios, 1.2 + 0.6 * order.double() / 4)
        by_definition(monkeypatch)
        F.close(got, model(ids).logits)
    refused(lambda: model(F.tokens()), NotImplementedError, "LlamaAttention", "MsPoE", "batch of 2")
    hf.unpatch(model)
    hf.patch(model, scaling=hf.MsPoE(first_layer=1))
    assert [layer.self_attn._fastpe.ms_poe is None for layer in model.model.layers] == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Regions

REGIONS = {
    "self_extend": {"region": R.self_extend(6, 3)},
    "self_extend_scaled": {"region": R.self_extend(6, 4, scale_base=8)},
    "rerope": {"region": R.rerope(6, 8)},
    "leaky_rerope": {"region": R.leaky_rerope(6, 4.0)},
    "dual_chunk": {"region": R.dual_chunk(9, 2, original_length=16)},
    "string": {"region": R.string(8, 3)},
    "streaming": {"region": R.streaming(2, 7), "mask": fastpe.mask.streaming(2, 7)},
    "self_extend_yarn": {"region": R.self_extend(6, 3), "scaling": {"rope_type": "yarn", "factor": 2.0}},
}


@pytest.mark.parametrize("name", REGIONS)
def test_region(name, monkeypatch):
    model = hf.patch(F.twin("llama"), **REGIONS[name])
    ids, real = F.tokens(), F.left_padding()
    static = {"cache_implementation": "static"}
    tokens = generate(model, input_ids=ids)
    assert torch.equal(tokens, generate(model, input_ids=ids, use_cache=False))
    assert torch.equal(tokens, generate(model, input_ids=ids, **static))
    # A padded text is read like the same text alone.
    padded = generate(model, input_ids=ids, attention_mask=real)
    assert torch.equal(padded[:1, F.LENGTH :], generate(model, input_ids=ids[:1, 5:])[:, F.LENGTH - 5 :])
    with torch.no_grad():
        got = model(ids).logits
        assert not torch.allclose(got, F.eager("llama")(ids).logits, atol=1e-3)
        F.close(model(ids, attention_mask=real).logits[0, 5:], model(ids[:1, 5:]).logits[0])
        by_definition(monkeypatch)
        F.close(got, model(ids).logits)


def test_region_gradients(monkeypatch):
    grads = []
    for dense in (False, True):
        if dense:
            by_definition(monkeypatch)
        model = hf.patch(F.twin("llama"), region=R.dual_chunk(9, 2))
        model(F.tokens(), labels=F.tokens(1)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        F.close(got, want, 1e-4)


def test_added_bias():
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    model = hf.patch(F.twin("llama"), bias=fastpe.bias.Alibi(slopes))
    i = torch.arange(F.LENGTH)
    mask = -slopes[:, None, None] * (i[:, None] - i).abs()
    mask = mask.masked_fill(i > i[:, None], torch.finfo(torch.float32).min).expand(F.BATCH, -1, -1, -1)
    with torch.no_grad():
        F.close(model(F.tokens()).logits, F.eager("llama")(F.tokens(), attention_mask=mask).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_refusals():
    def patch(name="llama", **more):
        return lambda: hf.patch(F.twin(name), **more)

    refused(patch(rope="fast"), ValueError, "LlamaForCausalLM", "rope must be", "'fast'")
    refused(patch(region="self_extend"), TypeError, "LlamaForCausalLM", "region must be", "str")
    refused(patch(bias=torch.zeros(1)), TypeError, "LlamaForCausalLM", "bias must be", "Tensor")
    refused(patch(mask=torch.zeros(1)), TypeError, "LlamaForCausalLM", "mask must be", "Tensor")
    refused(patch(scaling=2.0), TypeError, "LlamaForCausalLM", "scaling must be", "float")
    refused(patch(scaling={"rope_type": "yearn"}), NotImplementedError, "LlamaAttention", "scaling", "yearn")
    refused(patch(scaling={"rope_type": "linear"}), NotImplementedError, "LlamaAttention", "factor")
    refused(patch(rope="op", region=R.rerope(4)), ValueError, "LlamaForCausalLM", "rope='op'", "region")
    refused(patch(region=R.rerope(4), scaling=hf.MsPoE()), NotImplementedError, "LlamaForCausalLM", "region", "MsPoE")
    refused(patch(region=R.streaming(2, 4)), ValueError, "LlamaForCausalLM", "mask=fastpe.mask.streaming")
    refused(patch("t5", rope="op"), NotImplementedError, "T5ForConditionalGeneration", "rotation")
    refused(patch("bloom", region=R.rerope(4)), NotImplementedError, "BloomForCausalLM", "rotation")
    model = F.twin("llama")
    refused(lambda: hf.patch(model, scaling={"rope_type": "linear"}), NotImplementedError)
    assert hf.patch(model) is model, "a refused patch leaves nothing behind"


def test_region_with_packed_sequences_is_refused():
    model = hf.patch(F.twin("llama"), region=R.rerope(4))
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None]
    refused(lambda: model(F.tokens(batch=1), position_ids=positions, use_cache=False), NotImplementedError, "LlamaAttention", "region", "attention_mask")
