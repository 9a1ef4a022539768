"""Rotary positions stretched to long texts: equal to transformers wherever a decoder computes angles."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from sample_models import build_decoder, build_tokenizer

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.bridge import export_tensors, from_transformers, load_decoder, read_config, save_model, to_transformers
from llmbook.bridge import write_config
from llmbook.core import InputError, SettingsError
from llmbook.engine import Engine, EngineSettings
from llmbook.generation import KeyValueCache, LeanDecoder, complete
from llmbook.positions import Stretch, rotary_frequencies, stretched_angles
from llmbook.sampling import Sampling

TRAINED, CONTEXT = 24, 96
OLD = {"original_max_position_embeddings": TRAINED}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | OLD
YARN = {"rope_type": "yarn", "factor": 4.0} | OLD
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3, other bands": LLAMA3 | {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.5},
    "llama3, no length": {name: value for name, value in LLAMA3.items() if name not in OLD},
    "yarn": YARN,
    "yarn, no length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, no factor": YARN | {"factor": None},
    "yarn, attention factor": YARN | {"attention_factor": 1.6},
    "yarn, two scales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, one scale": YARN | {"mscale": 0.7},
    "yarn, other turns": YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, broken ramp": YARN | {"truncate": False, "beta_fast": 6.0},
}
SHAPES = {
    "grouped, untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "one head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 18},
}
KINDS = [Stretch("linear", 4.0), Stretch("ntk", 4.0), Stretch("llama3", 4.0, TRAINED), Stretch("yarn", 4.0, TRAINED),
         Stretch("yarn", 4.0, TRAINED, 1.5, 9.0, 1.4, whole=False)]


def build(rope, older=False, family="Llama", **change):
    """A random-weight model of transformers that reads beyond what it was trained on."""
    options = {"vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 70,
               "max_position_embeddings": CONTEXT} | change
    options |= {"rope_scaling": rope, "rope_theta": 5e4} if older else {"rope_parameters": rope | {"rope_theta": 5e4}}
    options |= {"sliding_window": None} if family == "Mistral" else {}
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    return model


def gradients(model):
    """The gradient of each weight under transformers' names."""
    if not hasattr(model, "settings"):
        return {name: weight.grad for name, weight in model.named_parameters()}
    twin = Decoder(model.settings)
    for mine, weight in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = weight.grad
    return export_tensors(twin)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROPES)
def test_logits_and_gradients(name, shape):
    theirs = build(ROPES[name], **SHAPES[shape])
    ours = from_transformers(theirs)
    t = CONTEXT
    ids, real = torch.randint(0, 83, (3, t)), torch.arange(t) < torch.tensor([[t], [t - 9], [TRAINED]])
    left = real.flip(1)  # padding may stand on either side, with its own positions
    places = (left.long().cumsum(1) - 1).clamp(min=0)
    for model in (ours, theirs):
        for weight in model.parameters():
            weight.grad = None
    mine = ours(ids)
    other = theirs(ids, attention_mask=real.long()).logits
    torch.testing.assert_close(mine[real], other[real], atol=1e-4, rtol=1e-4)
    for logits in (mine, other):
        (logits.log_softmax(-1)[..., 3] * real).sum().div(t).backward()
    found = gradients(ours)
    expected = {name: grad for name, grad in gradients(theirs).items() if grad is not None}
    largest = max(grad.abs().max() for grad in expected.values())
    assert max((found[name] - grad).abs().max() for name, grad in expected.items()) < 1e-4 * largest
    mask = torch.ones(t, t, dtype=torch.bool).tril() & left[:, None, None]
    with torch.no_grad():
        mine = ours(ids, positions=places, mask=mask)
        other = theirs(ids, attention_mask=left.long(), position_ids=places).logits
    torch.testing.assert_close(mine[left], other[left], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", ROPES)
def test_folders_both_ways(name, older, family, tmp_path):
    model, ids = build(ROPES[name], older, family, num_key_value_heads=2), torch.randint(0, 83, (2, CONTEXT))
    model.save_pretrained(tmp_path / "theirs")
    if older:  # as transformers 4 wrote it
        path = tmp_path / "theirs" / "config.json"
        config = json.loads(path.read_text())
        rope = dict(config.pop("rope_parameters"))
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope["rope_type"]}}
        path.write_text(json.dumps(config))
    ours = load_decoder(tmp_path / "theirs")
    save_model(ours, None, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert load_decoder(tmp_path / "ours").settings == ours.settings == from_transformers(again).settings
    with torch.no_grad():
        expected = model(ids).logits
        for found in (ours(ids), again(ids).logits, to_transformers(ours)(ids).logits):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_older_readers_find_the_stretch_too():
    """Readers of version 4 look at `rope_scaling` and `rope_theta`, never at `rope_parameters`."""
    for stretch in KINDS:
        settings = DecoderSettings(50, context=CONTEXT, stretch=stretch, rope_base=5e4)
        config = write_config(settings)
        old = {name: value for name, value in config.items() if name != "rope_parameters"}
        for read in (read_config(config), read_config(old)):
            angles = [stretched_angles(torch.arange(CONTEXT), 64, s.stretch, s.rope_base) for s in (read, settings)]
            torch.testing.assert_close(*angles, atol=1e-6, rtol=0)
        assert write_config(read_config(config)) == write_config(read_config(old)) == config


@pytest.mark.parametrize("changes", [{}, {"tied": False, "key_value_heads": 1, "head_width": 12}])
@pytest.mark.parametrize("stretch", KINDS, ids=str)
def test_every_way_of_decoding_agrees(stretch, changes):
    tokenizer = build_tokenizer()
    decoder = build_decoder(len(tokenizer), stretch=stretch, **changes).double()
    lean, ids = LeanDecoder.of(decoder), torch.randint(3, 200, (1, CONTEXT))
    with torch.inference_mode():
        full = decoder.states(ids)
        for model in (decoder, lean):
            cache = KeyValueCache(model.settings, CONTEXT, like=model.norm.weight)
            steps = [ids[:, :5], *ids[:, 5:].split(7, 1)]
            torch.testing.assert_close(torch.cat([model.states(s, cache) for s in steps], 1), full, atol=1e-4, rtol=1e-4)
    prompts, how = [ids[0, :n].tolist() for n in (2, 30, 60)], Sampling(max_tokens=30)
    found = [complete(model, tokenizer, prompt, how) for model in (decoder, lean) for prompt in prompts]
    assert [list(one.tokens) for one in found[:3]] == [list(one.tokens) for one in found[3:]]
    assert Engine(decoder, tokenizer, EngineSettings(60, 4, 10, 32)).run(prompts, [how] * 3) == found[3:]
    plain = Decoder(dataclasses.replace(decoder.settings, stretch=Stretch())).double().eval()
    plain.load_state_dict(decoder.state_dict())
    assert (plain.states(ids) - full).abs().max() > 0.1, "the stretch must be felt"


def test_transformers_generates_the_same(tmp_path):
    decoder = build_decoder(83, stretch=Stretch("llama3", 4.0, TRAINED))
    lean, theirs, ids = LeanDecoder.of(decoder), to_transformers(decoder), torch.randint(3, 83, (1, 40))
    with torch.inference_mode():
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTEXT - 40, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)
        for model in (decoder, lean):
            cache, text = KeyValueCache(model.settings, CONTEXT, like=model.norm.weight), ids
            step = ids
            while text.shape[1] < CONTEXT:
                step = (model.states(step, cache)[:, -1:] @ decoder.output_weight.T).argmax(-1)
                text = torch.cat((text, step), 1)
            assert torch.equal(text, expected)


@pytest.mark.parametrize(("rope", "message"), [
    ({"rope_type": "dynamic", "factor": 2.0}, "dynamic.*linear or yarn or llama3"), ({"rope_type": "longrope"}, "longrope"),
    ({"rope_type": "proportional"}, "proportional"), ({"type": "su"}, "su"), ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "linear", "factor": 0.5}, "factor"), ({"rope_type": "linear", "factor": "two"}, "two"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"), (LLAMA3 | {"high_freq_factor": 1.0}, "slow < fast"),
    (YARN | {"original_max_position_embeddings": 0}, "trained"), (YARN | {"attention_factor": -1.0}, "sharpness"),
    (YARN | {"factor": math.nan}, "factor"), (LLAMA3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_type": "default", "rope_theta": 0.5}, "base"), ({"rope_type": "default", "rope_theta": math.inf}, "base"),
    ("llama3", "cannot be used"), ([8], "cannot be used"),
])
def test_what_cannot_be_read_is_refused(rope, message):
    for place in ("rope_parameters", "rope_scaling"):
        config = write_config(DecoderSettings(50, context=CONTEXT))
        del config["rope_parameters"], config["rope_theta"]
        if isinstance(rope, dict) and place == "rope_scaling" and "rope_theta" in rope:
            config["rope_theta"] = rope["rope_theta"]
        with pytest.raises(InputError, match=message):
            read_config(config | {place: rope})


def test_settings_that_do_not_fit():
    for wrong in ({"stretch": "llama3"}, {"stretch": None}, {"rope_base": 1.0}, {"rope_base": math.nan},
                  {"head_width": 2, "stretch": Stretch("ntk", 2.0)}, {"head_width": 64, "stretch": Stretch("yarn", 2.0, 3)}):
        with pytest.raises(SettingsError, match="Allowed"):
            DecoderSettings(50, **wrong)


def test_llama_3_1_as_published():
    """The corner of its configuration: the fastest pairs keep their speed, the slowest turn eight times slower."""
    stretch = Stretch("llama3", 8.0, 8192)
    plain, slowed = rotary_frequencies(128, base=5e5), rotary_frequencies(128, stretch, 5e5)
    assert torch.equal(plain[:20], slowed[:20])
    torch.testing.assert_close(plain[-20:] / slowed[-20:], torch.full((20,), 8.0))
