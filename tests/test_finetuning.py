"""Fine-tuning on texts that are in no notebook: labels, packing, the stage, other people's models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.bridge import load_decoder, save_model
from llmbook.core import InputError, SettingsError, write_json
from llmbook.finetuning import (
    FinetuneSettings, Instruction, LabelledExample, answer_losses, as_conversations,
    continue_pretraining, cut_examples, finetune, label_conversations, pack_examples,
)
from llmbook.objectives import heldout_bits_per_byte
from llmbook.optimisation import TrainSettings
from llmbook.tokenization import TokenShard, identify_tokenizer, train_tokenizer, write_shard
from llmbook.training import train

TEXTS = [f"The square of {i} is {i * i}. Half of {i} is {i / 2}." for i in range(400)]
PAIRS = [(f"What is the square of {i}?", f"The square of {i} is {i * i}.") for i in range(400)]
SETTINGS = FinetuneSettings(
    steps=30, batch=4, context=48, pairs=300, held_out=20, samples=1, precision="float32",
    learning_rate=2e-3, matrix_rate=4e-3,
    checkpoint_every=10,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    "Corpus, tokens and model as the earlier stages leave them."
    folder = tmp_path_factory.mktemp("run")
    paths = {name: folder / name for name in ("corpus", "tokens", "model", "tokenizer")}
    for path in paths.values():
        path.mkdir()
    tokenizer = train_tokenizer(TEXTS, 320)
    for split, pairs in {"train": PAIRS[:350], "validation": PAIRS[350:]}.items():
        rows = [{"question": q, "answer": a, "document": "0", "symbol": "x"} for q, a in pairs]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, paths["corpus"] / f"pairs-{split}.parquet")
    parts = {"train": TEXTS[:350], "validation": TEXTS[350:], "test": TEXTS[:1]}
    splits = {name: write_shard(tokenizer, [part], paths["tokens"], name) for name, part in parts.items()}
    meta = {"dtype": "uint16", "vocabulary": len(tokenizer), "splits": splits}
    write_json(paths["tokens"] / "meta.json", meta | {"tokenizer": identify_tokenizer(tokenizer)})
    torch.manual_seed(0)
    model = Decoder(DecoderSettings(len(tokenizer), 2, 64, 2, 2, 96, 64))
    save_model(model, tokenizer, paths["model"])
    return paths


def load(inputs: dict[str, Path]):
    from llmbook.tokenization import load_tokenizer

    return load_tokenizer(inputs["model"])


def test_stage_teaches_to_answer_and_resumes_to_the_same_weights(inputs, tmp_path, monkeypatch):
    outputs = [tmp_path / name for name in ("whole", "killed")]
    for output in outputs:
        output.mkdir()
    numbers = finetune(SETTINGS, inputs, outputs[0])
    json.dumps(numbers)
    before, after = numbers["before"], numbers["after"]
    assert len(before["answer_losses"]) == len(after["answer_losses"]) == 20
    assert after["answer_loss"] < 0.7 * before["answer_loss"]

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmbook.finetuning.save_model", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(SETTINGS, inputs, outputs[1])
    monkeypatch.undo()
    again = finetune(SETTINGS, inputs, outputs[1])
    assert again["resumed_from"] == 30
    assert again["before"] == before and again["after"] == after


def test_only_answers_are_learnt_in_long_conversations(inputs):
    tokenizer = load(inputs)
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Half of 4?"},
        {"role": "assistant", "content": "It is 2."}, {"role": "user", "content": "Of 2?"},
        {"role": "assistant", "content": "It is 1."},
    ]
    marked = label_conversations(tokenizer, [turns])[0]
    words = tokenizer.decode([label for label in marked.labels if label >= 0])
    assert words == "It is 2.<|end|>It is 1.<|end|>"
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    assert label_conversations(tokenizer, [turns])[0] == marked


def test_another_familys_template(inputs):
    "A template in the style of ChatML, with newlines and no generation marks."
    tokenizer = load(inputs)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    example = label_conversations(tokenizer, as_conversations([("Half of 4?", "2.")]))[0]
    assert tokenizer.decode([i for i in example.labels if i >= 0]) == "2.<|im_end|>\n"


def test_no_template_no_pairs_nothing_left(inputs, tmp_path):
    tokenizer = load(inputs)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        label_conversations(tokenizer, as_conversations(PAIRS[:1]))
    empty = tmp_path / "corpus"
    empty.mkdir()
    with pytest.raises(InputError, match="pairs-train"):
        finetune(SETTINGS, inputs | {"corpus": empty}, tmp_path)
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("question", "answer")])
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(schema.empty_table(), empty / f"pairs-{split}.parquet")
    with pytest.raises(InputError, match="no question-answer pairs"):
        finetune(SETTINGS, inputs | {"corpus": empty}, tmp_path)
    with pytest.raises(InputError, match="none of 2,?\\d* examples|none of 20 examples"):
        finetune(replace(SETTINGS, context=3), inputs, tmp_path)
    with pytest.raises(SettingsError, match="replay"):
        FinetuneSettings(batch=4, replay=4)
    with pytest.raises(InputError, match="at least two"):
        continue_pretraining(inputs["model"], ["one"], tmp_path / "x")


def test_packing_keeps_every_example_whole():
    chance = np.random.default_rng(0)
    for length in (16, 33, 100):
        examples = []
        for _ in range(200):
            size = int(chance.integers(1, length + 1))
            ids = tuple(int(i) for i in chance.integers(10, 99, size))
            examples.append(LabelledExample(ids, (-100,) * (size // 2) + ids[size // 2 :]))
        ids, labels = pack_examples(examples, length, separator=1, pad=0)
        assert ids.shape[1] == length
        assert (labels >= 0).sum() == sum(example.targets for example in examples)
        rows = ["," + ",".join(map(str, row)) + "," for row in ids.tolist()]
        for example in examples:
            assert any("," + ",".join(map(str, example.ids)) + "," in row for row in rows)
        least = sum(len(example.ids) for example in examples) / length
        assert len(ids) <= 1.25 * least + 1


def test_losses_do_not_depend_on_neighbours(inputs):
    model = load_decoder(inputs["model"])
    examples = cut_examples(label_conversations(load(inputs), as_conversations(PAIRS[:23])), 65)
    together = answer_losses(model, examples, rows=7)
    alone = [answer_losses(model, [example])[0] for example in examples]
    assert np.allclose(together, alone, atol=1e-5)


def test_replay_keeps_the_plain_text(inputs, tmp_path):
    tokenizer, rest = load(inputs), TokenShard(inputs["tokens"], "validation")
    plain = TokenShard(inputs["tokens"], "train").tokens
    examples = label_conversations(tokenizer, as_conversations(PAIRS[:300]))
    settings = TrainSettings(steps=40, precision="float32", device="cpu")
    scores = {}
    for rows in (0, 2):
        model = load_decoder(inputs["model"])
        objective = Instruction(examples, 48, 6, tokenizer.eos_token_id, plain, rows)
        train(model, objective, settings, tmp_path / str(rows))
        scores[rows] = heldout_bits_per_byte(model.eval(), rest, 48)
    assert scores[2] < scores[0]


def test_continued_pretraining_adapts_any_llama(inputs, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load(inputs)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    poem = [f"Line {i}: the cat sat on the mat number {i}." for i in range(80)]
    settings = TrainSettings(steps=25, precision="float32", device="cpu")
    numbers = continue_pretraining(tmp_path / "theirs", poem, tmp_path / "ours", settings, 4, 48)
    assert numbers["after"] < 0.7 * numbers["before"]
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert opened.config.num_key_value_heads == 2
