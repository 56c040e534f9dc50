"""transformers models on fastpe against the same weights on "eager"."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import families as F
import transformers as T

import fastpe
import fastpe.integrations.transformers as hf

hf.register()
T.logging.set_verbosity_error()

ALL = [*F.ROPE, *F.ENCODERS, *F.TABLES, *(f"{name}_patched" for name in F.TABLES), *F.PATCHED]


def fast(name: str):
    """The model of a family on fastpe: by name, or patched where that is what the case says or the only way."""
    model = F.twin(name)
    if name in F.PATCHED or name.endswith("_patched"):
        return hf.patch(model)
    model.set_attn_implementation("fastpe")
    return model


def inputs(name: str, **more):
    given = {"input_ids": F.tokens()} | more
    if F.has_decoder(name):
        given["decoder_input_ids"] = F.tokens(1, length=15)
    return given


# ---------------------------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.parametrize("name", ALL)
def test_logits(name):
    model, eager = fast(name), F.eager(name)
    real = F.left_padding()
    with torch.no_grad():
        with hf.count_calls(model) as calls:
            got = model(**inputs(name)).logits
        assert calls.total >= 2
        F.close(got, eager(**inputs(name)).logits)
        padded = inputs(name, attention_mask=real)
        got, want = model(**padded).logits, eager(**padded).logits
        if F.has_decoder(name):
            F.close(got, want)
        else:
            F.close(got[real.bool()], want[real.bool()])
            assert torch.isfinite(got).all(), "rows that see nothing are 0"


@pytest.mark.parametrize("name", ALL)
def test_an_error_in_the_scores_would_show(name, monkeypatch):
    """What the tolerance of the others is worth: 2 % in the scale is 20 times above it."""
    monkeypatch.setattr(hf, "attention", lambda *args, scale, **more: fastpe.attention(*args, scale=1.02 * scale, **more))
    model, eager = fast(name), F.eager(name)
    with torch.no_grad():
        got, want = model(**inputs(name)).logits, eager(**inputs(name)).logits
    assert (got - want).abs().max() > 4e-4 * want.abs().max()


@pytest.mark.parametrize("name", [n for n in F.ROPE if n != "qwen2_vl"])
def test_packed_sequences(name):
    """Positions that start again separate sequences."""
    model, eager = fast(name), F.eager(name)
    positions = torch.cat([torch.arange(n) for n in (8, 1, 12)])[None]
    given = {"input_ids": F.tokens(batch=1), "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        want = eager(**given).logits
        F.close(model(**given).logits, want)
        if name not in ("gpt_oss", "llama_dynamic"):  # gpt-oss builds its masks without positions, dynamic NTK looks at the longest
            F.close(model(**given).logits[:, 9:], eager(input_ids=F.tokens(batch=1)[:, 9:], use_cache=False).logits)


def test_images():
    """Three-axis positions and the attention of the vision tower."""
    model, eager = fast("qwen2_vl"), F.eager("qwen2_vl")
    ids = F.tokens(batch=1)
    ids[0, 3], ids[0, 4:8], ids[0, 8] = 82, 80, 83
    patches = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == 80).long()}
    with torch.no_grad():
        want = eager(**given).logits
        with hf.count_calls(model) as calls:
            F.close(model(**given).logits, want)
        assert calls.by_class == {"VisionAttention": 1, "Qwen2VLAttention": 2}
        F.close(hf.patch(model, rope="op")(**given).logits, want)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    labels = F.tokens(2, length=15 if F.has_decoder(name) else F.LENGTH)
    real = F.left_padding()
    if not F.has_decoder(name):
        # The first real token would be predicted by a row that sees nothing, where eager attends to everything.
        labels = labels.masked_fill(F.left_padding((6, 0)) == 0, -100)
    grads = []
    for model in (F.twin(name), fast(name)):
        loss = model(input_ids=F.tokens(), attention_mask=real, labels=labels).loss
        loss.backward()
        grads.append({what: p.grad for what, p in model.named_parameters() if p.grad is not None})
    want, got = grads
    assert want.keys() == got.keys() and len(want) > 8
    size = max(g.abs().max().item() for g in want.values())
    for what, g in want.items():
        assert (got[what] - g).abs().max().item() <= 1e-4 * max(g.abs().max().item(), 1e-2 * size), what


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5_patched", "bloom"])
def test_half_precision(name):
    """The error against float32 with the same weights is at most twice that of eager."""
    exact = F.build(name.removesuffix("_patched"))
    half = F.twin(name).bfloat16()
    exact.load_state_dict({what: x.float() for what, x in half.state_dict().items()})
    with torch.no_grad():
        want = exact(**inputs(name)).logits
        theirs = (half(**inputs(name)).logits - want).square().mean().sqrt()
        hf.patch(half)
        ours = (half(**inputs(name)).logits - want).square().mean().sqrt()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("name", ["llama", "t5_patched"])
def test_checkpointing_and_autocast(name):
    labels = F.tokens(2, length=15 if F.has_decoder(name) else F.LENGTH)
    grads = []
    for checkpoint in (False, True):
        model = fast(name).train()
        if checkpoint:
            model.activation_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=F.tokens(), labels=labels, use_cache=False).loss
        loss.backward()
        grads.append({what: p.grad for what, p in model.named_parameters() if p.grad is not None})
    for what, want in grads[0].items():
        F.close(grads[1][what], want, 1e-6), what


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def generate(model, **more):
    return model.generate(max_new_tokens=9, do_sample=False, pad_token_id=0, **more)


@pytest.mark.parametrize("name", [n for n in ALL if n not in F.ENCODERS])
def test_greedy_tokens(name):
    model, eager = fast(name), F.eager(name)
    given = {"input_ids": F.tokens(), "attention_mask": F.left_padding()}
    static = {"cache_implementation": "static"}
    for cache in ({}, static) if name != "falcon_alibi" else ({},):  # with a static cache Falcon's ALiBi fails in transformers
        assert torch.equal(generate(model, **given, **cache), generate(eager, **given, **cache)), cache


def test_assisted_and_beam_search():
    model, eager = fast("mistral"), F.eager("mistral")
    given = {"input_ids": F.tokens(), "attention_mask": F.left_padding()}
    assert torch.equal(generate(model, **given, num_beams=3), generate(eager, **given, num_beams=3))
    prompt = {"input_ids": F.tokens(batch=1)}
    assert torch.equal(generate(model, **prompt, assistant_model=fast("llama")), generate(eager, **prompt))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_cached_prompts_of_several_tokens(name):
    """A second prompt behind a cache: more than one query, fewer than keys."""
    model, eager = fast(name), F.eager(name)
    ids = F.tokens()
    with torch.no_grad():
        want = eager(ids).logits
        for cache in (T.DynamicCache(config=model.config), T.StaticCache(config=model.config, max_cache_len=40)):
            first = model(ids[:, :9], past_key_values=cache).logits
            second = model(ids[:, 9:], past_key_values=cache).logits
            F.close(torch.cat([first, second], 1), want)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_masks_stay_linear():
    """No mask of Nq x Nk comes out of the mask function for what transformers composes itself."""
    model = fast("mistral")
    made = []
    from fastpe.integrations import _hf_mask

    def spy(*args, **more):
        made.append(_hf_mask.mask_function(*args, **more))
        return made[-1]

    T.AttentionMaskInterface.register(hf.NAME, spy)
    try:
        positions = torch.cat([torch.arange(n) for n in (8, 1, 12)])[None]
        with torch.no_grad():
            model(F.tokens(), attention_mask=F.left_padding())
            model(F.tokens(batch=1), position_ids=positions, use_cache=False)
            model(F.tokens(), past_key_values=T.StaticCache(config=model.config, max_cache_len=40))
            fast("llama4").model(F.tokens())
            assert model(F.tokens()[:, :4]).logits.shape[1] == 4 and made[-1] is None
    finally:
        hf.register()
    assert len(made) >= 6
    assert all(m is None or (m.dtype == torch.int32 and m.shape[2] == 3) for m in made)


def test_masks_of_a_user():
    model, eager = fast("llama"), F.eager("llama")
    see = torch.rand(F.BATCH, 1, F.LENGTH, F.LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    see = (see & torch.ones(F.LENGTH, F.LENGTH).tril().bool()) | torch.eye(F.LENGTH).bool()
    added = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = eager(F.tokens(), attention_mask=added).logits
        F.close(model(F.tokens(), attention_mask=added).logits, want)
        F.close(model(F.tokens(), attention_mask=see).logits, want)


def test_overlays_of_a_user_and_image_blocks():
    from transformers.masking_utils import create_causal_mask

    model, eager = fast("llama"), F.eager("llama")
    blocks = torch.tensor([[-1] * 3 + [0] * 5 + [-1] * 4 + [1] * 9]).expand(F.BATCH, -1)
    x = model.get_input_embeddings()(F.tokens())
    overlays = {"or_mask_function": lambda b, h, q, k: (q < 4) & (k < 4), "and_mask_function": lambda b, h, q, k: (q + k) % 3 != 1}
    for more in ({"block_sequence_ids": blocks}, {"or_mask_function": overlays["or_mask_function"]}, {"and_mask_function": overlays["and_mask_function"]}):
        made = [create_causal_mask(m.config, x, None, None, **more) for m in (model, eager)]
        assert made[0].dtype == torch.bool
        assert torch.equal(made[0], made[1] == 0)


@pytest.mark.parametrize("make", ["causal", "sliding_window_causal", "chunked_causal", "sliding_window_bidirectional"])
@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
@pytest.mark.parametrize(("rows", "cached"), [(21, 0), (1, 12), (5, 9), (1, 0)])
def test_compact_masks_mean_what_eager_masks_mean(make, pads, rows, cached):
    from transformers import masking_utils

    from fastpe._call import Call
    from fastpe.integrations._hf_mask import mask_function, visibility

    maker = getattr(masking_utils, f"{make}_mask_function")
    total = cached + rows
    function = {"causal": maker, "chunked_causal": lambda: maker(4, torch.tensor(pads))}.get(make, lambda: maker(4))
    function = function if make == "causal" else function()
    real = F.left_padding(pads, total).bool()
    for kv_length, kv_offset, q_offset in ((total, 0, cached), (total + 6, 0, torch.tensor(cached)), (min(total, 7), total - min(total, 7), cached)):
        if kv_offset and (rows > 1 or make == "chunked_causal"):
            continue
        want = masking_utils.sdpa_mask(2, rows, kv_length, q_offset, kv_offset, function, real, allow_is_causal_skip=False)
        compact = mask_function(2, rows, kv_length, q_offset, kv_offset, function, real, 4, allow_is_causal_skip=False)
        assert compact.dtype == torch.int32
        seen = visibility("test", compact, True, rows, kv_length)
        call = Call(2, 1, rows, seen.keys, False, torch.float32, torch.device("cpu"))
        got = torch.ones(1, 1, rows, seen.keys, dtype=torch.bool) if seen.mask is None else seen.mask.materialize(call)
        assert not want[..., seen.keys :].any()
        assert torch.equal(got.expand(2, 1, -1, -1), want[..., : seen.keys])


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def test_fullgraph():
    """Forward and backward of a layer with a window, softcap and padding in one graph."""
    torch._dynamo.reset()
    cls, config = F.FAMILIES["gemma2"]()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    real = F.left_padding().bool()
    given = {"input_ids": F.tokens(), "attention_mask": real.long(), "use_cache": False}
    grads = []
    for how in ("eager", "fastpe"):
        model.set_attn_implementation(how)
        call = model if how == "eager" else torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        logits = call(**given).logits[real]
        logits.square().mean().backward()
        grads.append([logits, *(p.grad.clone() for p in model.parameters())])
    for want, got in zip(*grads, strict=True):
        F.close(got, want, 1e-4)


def test_fullgraph_of_a_patched_t5():
    torch._dynamo.reset()
    cls, config = F.FAMILIES["t5"]()
    config.num_layers = config.num_decoder_layers = 1
    model = hf.patch(cls._from_config(config, attn_implementation="eager").eval())
    compiled = torch.compile(model.get_encoder(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = model.get_encoder()(F.tokens()).last_hidden_state
        F.close(compiled(F.tokens()).last_hidden_state, want)


def test_compiled_decoding_with_a_static_cache():
    torch._dynamo.reset()
    model, ids = fast("mistral"), F.tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = T.StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        steps = [compiled(ids[:, n : n + 1], past_key_values=cache).logits for n in range(15, 18)]
        F.close(torch.cat(steps, 1), F.eager("mistral")(ids).logits[:, 15:18])


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refused(call, error, *said: str):
    with pytest.raises(error) as caught:
        call()
    for text in said:
        assert text in str(caught.value), str(caught.value)


def test_dropout_is_refused():
    model = fast("llama")
    model.config.attention_dropout = 0.25
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.25
    model(F.tokens())
    model.train()
    refused(lambda: model(F.tokens()), NotImplementedError, "LlamaAttention", "dropout must be 0, got 0.25")


def test_unsupported_arguments_are_refused():
    module = F.eager("llama").model.layers[0].self_attn
    q = torch.randn(1, 4, 5, 16)
    for name in ("cache", "indices", "head_mask"):
        refused(lambda: hf.attention_forward(module, q, q, q, None, **{name: q}), NotImplementedError, "LlamaAttention", name)
    refused(lambda: hf.attention_forward(module, q, q, q, None, output_attentions=True), NotImplementedError, "LlamaAttention", "output_attentions")
    refused(lambda: hf.attention_forward(module, q, q, q, torch.ones(1, 5)), ValueError, "LlamaAttention", "attention_mask", "4 dimensions")
    refused(lambda: hf.attention_forward(module, q, q, q, torch.ones(1, 1, 5, 5).long()), TypeError, "LlamaAttention", "attention_mask", "int64")
    refused(lambda: hf.attention_forward(module, q, q, q, "mask"), TypeError, "LlamaAttention", "attention_mask", "str")


@pytest.mark.parametrize("name", ["bloom", "mpt", "codegen"])
def test_models_that_do_not_ask_are_reported(name):
    cls, config = F.FAMILIES[name]()
    model = cls._from_config(config, attn_implementation="fastpe")
    refused(lambda: model(F.tokens()), NotImplementedError, type(config).__name__, "attn_implementation", "patch(model)")


def test_no_call_is_reported():
    def run():
        with hf.count_calls(F.eager("llama")):
            F.eager("llama")(F.tokens())

    refused(run, RuntimeError, "LlamaForCausalLM", "LlamaAttention", "'eager'")


def test_head_sizes_that_are_no_step_of_8():
    cls, config = F.FAMILIES["llama"]()
    config.head_dim = 10
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(F.tokens()).logits
        model.set_attn_implementation("fastpe")
        F.close(model(F.tokens()).logits, want)


# ---------------------------------------------------------------------------------------------------------------------
# patch and unpatch


@pytest.mark.parametrize("name", ["t5", "bloom", "falcon", "mpt", "gptj", "llama"])
def test_unpatch_undoes_patch(name):
    model, eager = F.twin(name), F.eager(name)
    before = {what: dict(m.__dict__) for what, m in model.named_modules()}
    assert hf.patch(model) is model
    assert not torch.equal(model(**inputs(name)).logits, eager(**inputs(name)).logits), "float32 rounds differently"
    refused(lambda: hf.patch(model), ValueError, type(model).__name__, "unpatch")
    hf.unpatch(model)
    assert {what: m.__dict__.keys() for what, m in model.named_modules()} == {what: d.keys() for what, d in before.items()}
    assert torch.equal(model(**inputs(name)).logits, eager(**inputs(name)).logits)
    refused(lambda: hf.unpatch(model), ValueError, type(model).__name__)


def test_patched_models_can_be_copied_and_saved(tmp_path):
    import copy

    model = hf.patch(F.twin("bloom"))
    other = copy.deepcopy(model)
    with torch.no_grad(), hf.count_calls(other):
        want = model(F.tokens()).logits
        assert torch.equal(other(F.tokens()).logits, want)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        F.close(T.BloomForCausalLM.from_pretrained(tmp_path).eval()(F.tokens()).logits, want)


def test_no_dense_bias_in_a_patched_t5(monkeypatch):
    from fastpe.bias import Dense

    def refuse(self):
        raise AssertionError("a dense bias was made")

    model = fast("t5_patched")
    monkeypatch.setattr(Dense, "__post_init__", refuse)
    with torch.no_grad():
        model(**inputs("t5"), attention_mask=F.left_padding())


def test_models_without_a_way_in_are_refused():
    refused(lambda: hf.patch(torch.nn.Linear(2, 2)), TypeError, "Linear")
    config = T.DebertaV2Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    refused(lambda: hf.patch(T.DebertaV2Model(config)), NotImplementedError, "DebertaV2Model")


def test_text_beyond_max_seq_len_is_refused():
    model = hf.patch(F.twin("mpt"))
    refused(lambda: model(F.tokens(length=130)), ValueError, "MptAttention", "130 keys", "max_seq_len is 128")
