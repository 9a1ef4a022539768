"""Models of transformers, as others build and save them, open here with the same logits; and ours open there."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmbook.architecture import Decoder, DecoderSettings, EncoderDecoder, EncoderDecoderSettings, EncoderSettings
from llmbook.bridge import FAMILIES, find_family, load_decoder, load_model, read_config, save_model, to_transformers
from llmbook.bridge import from_transformers, import_tensors, write_config
from llmbook.core import CorruptFileError, InputError

SMALL = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 70}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 48, "d_kv": 10, "d_ff": 70, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
THEIRS = {
    "llama": ("Llama", SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}),
    "llama, tied": ("Llama", SMALL | {"tie_word_embeddings": True, "head_dim": 10}),
    "mistral": ("Mistral", SMALL | {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 12}),
    "mistral, wide window": ("Mistral", SMALL | {"sliding_window": 64, "max_position_embeddings": 64, "num_key_value_heads": 2}),
    "mistral, odd width": (
        "Mistral", SMALL | {"hidden_size": 50, "head_dim": 8, "sliding_window": None, "num_key_value_heads": 4},
    ),
    "bert": ("Bert", SMALL | {"max_position_embeddings": 64}),
    "bert, one segment": ("Bert", SMALL | {"type_vocab_size": 1, "layer_norm_eps": 1e-3}),
    "modernbert": ("ModernBert", SMALL | IDS),
    "modernbert, near": ("ModernBert", SMALL | IDS | {"local_attention": 8, "num_hidden_layers": 5,
                                                      "global_attn_every_n_layers": 2}),
    "t5": ("T5", T5),
    "t5, gated": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, few buckets": ("T5", T5 | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 30}),
}
CLASSES = {"Llama": "LlamaForCausalLM", "Mistral": "MistralForCausalLM", "Bert": "BertForMaskedLM",
           "ModernBert": "ModernBertForMaskedLM", "T5": "T5ForConditionalGeneration"}


def build(name, **change):
    "A random-weight model of transformers, with weights far from their small start."
    kind, options = THEIRS[name]
    torch.manual_seed(1)
    model = getattr(transformers, CLASSES[kind])(getattr(transformers, f"{kind}Config")(**options | change)).eval()
    std = 0.1 if kind == "T5" else 0.2
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=std) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    return model


def logits(model, ids, real):
    "Logits of real tokens, whoever's model it is."
    ours = hasattr(model, "settings")
    writes = isinstance(model, EncoderDecoder) or model.__class__.__name__.startswith("T5")
    if writes:
        written = ids.flip(1)
        if ours:
            return model(ids, written, real)
        return model(input_ids=ids, attention_mask=real.long(), decoder_input_ids=written).logits
    if isinstance(model, Decoder):
        return model(ids)[real]  # padding stands at the end: the causal mask hides it
    answer = model(ids, real) if ours else model(ids, attention_mask=real.long()).logits
    return answer[real]


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("t", [1, 2, 31])
def test_folders_of_others_open_here(name, t, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if t == 31 else "1GB")
    ours = load_model(tmp_path)
    ids, real = torch.randint(3, 99, (3, t)), torch.arange(t) < torch.tensor([[t], [max(1, t - 7)], [1]])
    torch.testing.assert_close(logits(ours, ids, real), logits(model, ids, real), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", THEIRS)
def test_there_and_back_again(name, tmp_path):
    model = build(name)
    ours = from_transformers(model)
    save_model(ours, None, tmp_path)
    architecture = getattr(transformers, write_config(ours.settings)["architectures"][0])
    again, ids = architecture.from_pretrained(tmp_path).eval(), torch.randint(3, 99, (2, 17))
    real = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(logits(again, ids, real), logits(model, ids, real), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(logits(to_transformers(ours), ids, real), logits(again, ids, real), atol=1e-5, rtol=1e-4)


shapes = st.one_of(
    st.builds(lambda g, kv, e, depth, tied, f: DecoderSettings(50, depth, 24, g * kv, kv, f, 40, tied=tied, head_width=2 * e),
              st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(1, 40)),
    st.builds(lambda h, e, depth, f, style, window, every: EncoderSettings(
        50, depth, 2 * h * e, h, f, 40, style, window=window, global_every=every),
        st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.sampled_from(["modern", "bert"]),
        st.integers(2, 50), st.integers(1, 4)),
    st.builds(lambda h, e, one, two, f, gated, tied: EncoderDecoderSettings(
        50, one, two, 24, h, f, e, gated, tied),
        st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.booleans(),
        st.booleans()),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(shapes, st.integers(1, 40))
def test_any_shape_equals_transformers(shape, t):
    ours = find_family(shape).model(shape).eval()
    ids = torch.randint(0, 50, (2, t))
    real = torch.arange(t) < torch.tensor([[t], [(t + 1) // 2]])
    torch.testing.assert_close(logits(to_transformers(ours), ids, real), logits(ours, ids, real), atol=1e-4, rtol=1e-3)
    assert write_config(read_config(write_config(shape))) == write_config(shape)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("bert", {"hidden_act": "relu"}, "hidden_act"), ("bert", {"tie_word_embeddings": False}, "tie_word"),
    ("bert", {"is_decoder": True}, "is_decoder"), ("modernbert", {"mlp_bias": True}, "mlp_bias"),
    ("modernbert", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention",
                                    "full_attention"]}, "period"),
    ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj"), ("t5", {"model_type": "mt5"}, "model_type"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type"), ("llama", {"hidden_size": None}, "cannot be used"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"num_hidden_layers": 2.0}, "depth"),
    ("llama", {"vocab_size": "99"}, "vocabulary"),
    ("llama", {"head_dim": -2}, "head_width"), ("llama", {"rms_norm_eps": None}, "epsilon"),
    ("llama", {"num_attention_heads": 0}, "heads"), ("llama", {"max_position_embeddings": None}, "context"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("mistral", {"sliding_window": 63, "max_position_embeddings": 64}, "64 and more"),
    ("mistral", {"model_type": "mistral", "max_position_embeddings": 5000, "sliding_window": 4096}, "sliding_window"),
    ("t5", {"dense_act_fn": "silu"}, "dense_act_fn"), ("t5", {"is_gated_act": True}, "is_gated_act"),
    ("t5", {"relative_attention_max_distance": 12}, "farther"), ("bert", {"hidden_act": "gelu_new"}, "hidden_act"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("modernbert", {"layer_types": ["full_attention"] * 9}, "period"), ("modernbert", {"layer_types": ["full"] * 3}, "period"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "rope_type"),
    ("modernbert", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
    ("modernbert", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "rope_parameters"),
    ("modernbert", {"global_attn_every_n_layers": 0, "layer_types": None}, "Allowed"),
])
def test_what_would_be_computed_differently_is_refused(name, change, message):
    config = write_config(from_transformers(build(name)).settings)
    with pytest.raises(InputError, match=message):
        read_config(config | change)


def test_configurations_of_transformers_4():
    modern = write_config(EncoderSettings(99, 4, 48, 4, 70, 64))
    del modern["layer_types"], modern["rope_parameters"]
    read = read_config(modern | {"global_rope_theta": 5e4, "local_rope_theta": 2e3})
    assert (read.global_every, read.bases) == (3, (5e4, 2e3))
    t5 = write_config(EncoderDecoderSettings(99))
    assert not read_config(t5).tied and read_config(t5 | {"tie_word_embeddings": True}).tied


def test_a_model_of_another_kind_is_no_decoder(tmp_path):
    build("bert").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="load_model"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_weights_that_do_not_fit(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    key = "d_ff" if name == "t5" else "intermediate_size"
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 71}))
    with pytest.raises(CorruptFileError, match="shape"):
        load_model(tmp_path)


def test_two_names_of_one_weight_must_agree():
    model = build("bert")
    tensors = dict(model.state_dict())
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    with pytest.raises(InputError, match="differs"):
        import_tensors(read_config(model.config.to_dict()), tensors)


def change_file(folder, change):
    "Write a model's tensors again, changed."
    tensors = load_file(folder / "model.safetensors")
    changed = {name: weight.contiguous() for name, weight in change(tensors).items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("name", "change", "error", "message"), [
    ("llama", lambda w: {n: x for n, x in w.items() if n != "lm_head.weight"}, CorruptFileError, "lm_head.weight` is missing"),
    ("llama", lambda w: {n: x for n, x in w.items() if n != UP}, CorruptFileError, "up_proj.weight` is missing"),
    ("llama", lambda w: w | {UP.replace("weight", "bias"): torch.ones(70)}, InputError, "up_proj.bias.*no place"),
    ("llama", lambda w: w | {UP.replace("1", "3"): w[UP].clone()}, InputError, "layers.3.*no place"),
    ("llama", lambda w: w | {UP: w[UP].to(torch.int8)}, InputError, "torch.int8"),
    ("llama, tied", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}, InputError, "differs"),
])
def test_files_that_say_something_else(name, change, error, message, tmp_path):
    build(name).save_pretrained(tmp_path)
    change_file(tmp_path, change)
    with pytest.raises(error, match=message):
        load_model(tmp_path)


def test_files_that_say_the_same_in_other_words(tmp_path):
    ids = torch.randint(3, 99, (2, 9))
    real = torch.ones_like(ids, dtype=torch.bool)
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    changes = {
        "llama": lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
        "llama, tied": lambda w: {n.replace("model.embed_tokens", "lm_head"): x for n, x in w.items()},
        "bert": lambda w: {old(n): x for n, x in w.items()} | {"cls.seq_relationship.weight": torch.ones(2, 48)},
        "t5": lambda w: w | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)},
    }
    for name, change in changes.items():
        model = build(name)
        model.save_pretrained(tmp_path / name)
        change_file(tmp_path / name, change)
        with torch.no_grad():
            expected = logits(type(model).from_pretrained(tmp_path / name).eval(), ids, real)
            torch.testing.assert_close(logits(load_model(tmp_path / name), ids, real), expected, atol=1e-4, rtol=1e-3)


def test_one_file_goes_before_an_old_index(tmp_path):
    "As in transformers: a model saved over one in pieces is the one that opens."
    build("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    newer = build("llama")
    with torch.no_grad():
        newer.lm_head.weight.add_(1)
    save_model(from_transformers(newer), None, tmp_path)
    torch.testing.assert_close(load_model(tmp_path).head.weight, newer.lm_head.weight)
    torch.testing.assert_close(transformers.LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight, newer.lm_head.weight)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_damaged_indices(text, tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError):
        load_model(tmp_path)


@pytest.mark.parametrize("kinds", [1, 5])
def test_segments_and_sixteen_bits(kinds, tmp_path):
    model, t = build("bert", type_vocab_size=kinds), 23
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    theirs, ours = transformers.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), load_model(tmp_path)
    ids, segments = torch.randint(3, 99, (2, t)), torch.randint(0, kinds, (2, t))
    real = torch.arange(t) < torch.tensor([[t], [9]])
    expected = theirs(ids, attention_mask=real.long(), token_type_ids=segments).logits[real]
    torch.testing.assert_close(ours(ids, real, segments)[real], expected, atol=1e-4, rtol=1e-3)


def test_families_have_names_for_every_weight():
    for shape in (DecoderSettings(), EncoderSettings(style="bert"), EncoderSettings(), EncoderDecoderSettings()):
        names = find_family(shape).names(shape)
        assert set(names) == set(find_family(shape).model(shape).state_dict())
    assert len(FAMILIES) == 4
