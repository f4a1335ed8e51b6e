import copy
import io
import json
import math

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from deltaloom.data.labels import LabelMap
from deltaloom.data.rows import ChatRow, ImageRow, Message, PlainRow, PromptRow, TextRow, TokensRow
from deltaloom.data.settings import DataSettings
from deltaloom.errors import DataError, RefusedError, SettingsError
from deltaloom.evaluate import Targets, task_named, task_names
from deltaloom.evaluate.causal_lm import causal_losses, has_plain_head
from tests.toy_tokenizers import byte_level, unigram, word_piece

BYTES, PIECES, UNIGRAM = byte_level(), word_piece(), unigram()
SETTINGS = DataSettings(train="a.jsonl", max_length=128)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "vocab_size": len(BYTES), "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 2,
           "max_position_embeddings": 256}
ENCODER = {**SMALL, "vocab_size": len(PIECES), "pad_token_id": 0, "max_position_embeddings": 128}
LANGUAGE_ROWS = [PromptRow("a:1", "name[Aromi]", "Aromi is a coffee shop."), PlainRow("a:2", "the film is good"),
                 ChatRow("a:3", (Message("user", "u"), Message("assistant", "It is four."))), PromptRow("a:4", "a", "b")]
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(BYTES), n_embd=16, n_layer=2, n_head=4, n_positions=256,
                                               bos_token_id=0, eos_token_id=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**DECODER, "num_key_value_heads": 4})),  # its head has a bias
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=4)),  # a softcap follows its head
}


def made(maker, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = maker()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def causal_task(model):
    return task_named("causal-lm")(SETTINGS, Targets(), model.config, tokenizer=BYTES)


def test_the_folder_is_the_registry():
    assert task_names() == ["causal-lm", "image-classification", "regression", "seq2seq-lm", "sequence-classification",
                            "token-classification"]
    for name in task_names():
        assert task_named(name).name == name and task_named(name).formats
    with pytest.raises(SettingsError, match=r"unknown task.*Did you mean 'causal-lm'"):
        task_named("casual-lm")
    with pytest.raises(SettingsError):
        task_named("base")


@pytest.mark.parametrize("layout", DECODERS)
def test_causal_loss_and_gradients_equal_those_of_transformers(layout):
    model = made(DECODERS[layout])
    model.requires_grad_(False)
    watched = model.get_input_embeddings().weight if layout == "gemma2" else next(
        parameter for name, parameter in model.named_parameters() if name.endswith(("q_proj.weight", "c_attn.weight")))
    watched.requires_grad_()
    assert has_plain_head(model) == (layout != "gemma2")
    task = causal_task(model)
    batch = task.collate(task.encode(LANGUAGE_ROWS))
    total, count = task.loss(model, batch)
    mask = torch.zeros_like(batch.labels)
    for row, length in enumerate(batch.lengths.tolist()):
        mask[row, :length] = 1
    theirs = model(input_ids=batch.inputs["input_ids"], attention_mask=mask, labels=batch.labels).loss
    assert count == (batch.labels[:, 1:] != -100).sum() == sum(
        sum(label != -100 for label in example.labels) for example in batch.examples)
    torch.testing.assert_close(total, theirs * count, check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(total, watched)[0], torch.autograd.grad(theirs * count, watched)[0],
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "phi"])
def test_a_head_that_trains_or_is_wrapped_goes_the_plain_way(layout):
    model = made(DECODERS[layout])
    task = causal_task(model)
    batch = task.collate(task.encode(LANGUAGE_ROWS))
    total, count = task.loss(model, batch)
    theirs = model(input_ids=batch.inputs["input_ids"], labels=batch.labels).loss * count
    head = model.get_output_embeddings().weight
    torch.testing.assert_close(torch.autograd.grad(total, head)[0], torch.autograd.grad(theirs, head)[0], rtol=1e-4, atol=1e-6)
    model.requires_grad_(False)
    wrapped = copy.deepcopy(model)
    wrapped.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings(), torch.nn.Identity()))
    torch.testing.assert_close(task.loss(wrapped, batch)[0], total, check_dtype=False)


def test_micro_batches_change_nothing():
    model = made(DECODERS["llama"])
    task = causal_task(model)
    examples = task.encode(LANGUAGE_ROWS)
    whole, count = task.loss(model, task.collate(examples))
    parts = [task.loss(model, task.collate(examples[start:stop])) for start, stop in ((0, 1), (1, 4))]
    torch.testing.assert_close(whole, parts[0][0] + parts[1][0], check_dtype=False)
    assert count == parts[0][1] + parts[1][1]


def test_the_tuned_model_gives_the_same_loss_through_both_ways():
    from deltaloom.deltas.lora import LoRA
    from deltaloom.tuned import attach

    model = made(DECODERS["llama"], dtype=torch.float32)
    task = causal_task(model)
    batch = task.collate(task.encode(LANGUAGE_ROWS))
    bare = task.loss(model, batch)[0].detach()
    tuned = attach(model, [LoRA(rank=2)])
    torch.testing.assert_close(task.loss(tuned, batch)[0], bare)
    with torch.no_grad():
        for parameter in tuned.delta_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    losses, places, labels = causal_losses(tuned, batch)
    plain = F.cross_entropy(tuned(**batch.inputs).logits.flatten(0, 1)[places], labels.flatten()[places + 1], reduction="none")
    torch.testing.assert_close(losses, plain)
    assert not torch.allclose(losses.sum(), bare)
    parameters = list(tuned.delta_parameters().values())
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), parameters), torch.autograd.grad(plain.sum(), parameters),
                               rtol=1e-4, atol=1e-5)


def test_causal_predictions_and_metrics_are_per_row_and_weighted_by_tokens():
    model = made(DECODERS["llama"])
    task = causal_task(model)
    examples = task.encode(LANGUAGE_ROWS)
    found = task.predict_all(model, examples, micro_tokens=60)
    for example, prediction in zip(examples, found, strict=True):
        total, count = task.loss(model, task.collate([example]))
        assert prediction == {"loss": pytest.approx(float(total.detach()), rel=1e-5), "tokens": count}
    metrics = task.metrics(found, LANGUAGE_ROWS)
    assert metrics["loss"] == pytest.approx(sum(each["loss"] for each in found) / sum(each["tokens"] for each in found))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    low, high = task.intervals(found, LANGUAGE_ROWS)["loss"]
    assert low <= metrics["loss"] <= high and task.intervals(found, LANGUAGE_ROWS)["loss"] == (low, high)
    json.dumps(found)


@pytest.mark.parametrize("maker", [
    lambda: T5ForConditionalGeneration(T5Config(vocab_size=len(UNIGRAM), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                                                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)),
    lambda: BartForConditionalGeneration(BartConfig(
        vocab_size=len(UNIGRAM), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1)),
], ids=["t5", "bart"])
def test_sequence_to_sequence_loss_equals_that_of_transformers(maker):
    model = made(maker)
    rows = [PromptRow("a:1", "the film", "is good"), PromptRow("a:2", "the film is good and the film is bad", "two")]
    task = task_named("seq2seq-lm")(SETTINGS, Targets(), model.config, tokenizer=UNIGRAM)
    batch = task.collate(task.encode(rows))
    total, count = task.loss(model, batch)
    theirs = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], labels=batch.labels).loss
    torch.testing.assert_close(total, theirs * count, check_dtype=False, rtol=1e-5, atol=1e-5)
    parameter = model.get_encoder().parameters().__next__()
    torch.testing.assert_close(torch.autograd.grad(total, parameter)[0], torch.autograd.grad(theirs * count, parameter)[0],
                               rtol=1e-4, atol=1e-6)
    found = task.predict_all(model, task.encode(rows))
    assert sum(each["loss"] for each in found) == pytest.approx(float(total.detach()), rel=1e-5)
    assert set(task.metrics(found, rows)) == {"loss", "perplexity"}


def text_rows(labels=("good", "bad", "good", "so", "bad")):
    texts = ["the film is good", "the film is bad", "film", "is the film", "is is is the film bad and good"]
    return [TextRow(f"a:{index + 1}", text, None, label) for index, (text, label) in enumerate(zip(texts, labels, strict=True))]


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_classification_loss_is_the_weighted_sum(weights):
    rows = text_rows()
    settings = DataSettings(train="a.jsonl", class_weights=weights)
    targets = task_named("sequence-classification").prepare(settings, rows, rows[:2])
    assert targets.labels == LabelMap(("bad", "good", "so"))
    model = made(lambda: BertForSequenceClassification(BertConfig(**ENCODER, num_labels=3)))
    task = task_named("sequence-classification")(settings, targets, model.config, tokenizer=PIECES)
    examples = task.encode(rows)
    batch = task.collate(examples)
    total, count = task.loss(model, batch)
    each = torch.stack([F.cross_entropy(model(**task.collate([example]).inputs).logits[0].float(), torch.tensor(example.labels))
                        for example in examples])
    weight = torch.ones(5) if weights == "none" else torch.tensor([5 / 6, 5 / 6, 5 / 6, 5 / 3, 5 / 6])
    torch.testing.assert_close(total, (each * weight).sum())
    assert float(count) == pytest.approx(5.0)
    parts = [task.loss(model, task.collate(part)) for part in (examples[:2], examples[2:])]
    torch.testing.assert_close(total, parts[0][0] + parts[1][0])
    assert float(parts[0][1]) == pytest.approx(float(weight[:2].sum()))
    found = task.predict_all(model, examples, micro_tokens=12)
    metrics = task.metrics(found, rows)
    assert metrics["loss"] == pytest.approx(float(each.mean().detach()), rel=1e-5)
    assert metrics["accuracy"] == sum(prediction["label"] == row.label for prediction, row in zip(found, rows, strict=True)) / 5
    assert all(sum(prediction["probabilities"].values()) == pytest.approx(1) for prediction in found)
    assert [row["class"] for row in task.tables(found, rows)["classes"]] == ["bad", "good", "so"]
    assert sum(row["support"] for row in task.tables(found, rows)["classes"]) == 5
    low, high = task.intervals(found, rows)["accuracy"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1 and task.shown(found[0]) in targets.labels.names
    json.dumps(found)


def test_rows_without_labels_can_be_predicted_and_not_trained_on():
    model = made(lambda: BertForSequenceClassification(BertConfig(**ENCODER, num_labels=2)))
    task = task_named("sequence-classification")(SETTINGS, Targets(LabelMap(("a", "b"))), model.config, tokenizer=PIECES)
    examples = task.encode([TextRow("a:1", "the film")])
    [found] = task.predict_all(model.train(), examples)
    assert found.keys() == {"label", "probabilities"} and model.training
    assert task.predict_all(model, examples) == [found]  # no dropout
    with pytest.raises(RefusedError):
        task.loss(model, task.collate(examples))


def test_the_tokenizer_limits_the_length_and_that_is_said():
    model = made(DECODERS["llama"])
    tokenizer = byte_level()
    tokenizer.model_max_length = 6
    task = task_named("causal-lm")(SETTINGS, Targets(), model.config, tokenizer=tokenizer)
    assert task.encode([PlainRow("a:1", "the film is good and bad")])[0].length == 6
    assert "128 counts as 6" in task.notes[0] and causal_task(model).notes == ()


def test_labels_must_be_two_and_known():
    kind = task_named("sequence-classification")
    with pytest.raises(DataError, match="same label"):
        kind.prepare(SETTINGS, text_rows(["good"] * 5))
    with pytest.raises(DataError, match=r"'so' in 1 place: a:4"):
        kind.prepare(SETTINGS, text_rows(["good", "bad", "good", "bad", "bad"]), text_rows())
    with pytest.raises(DataError, match="the trained model"):
        kind.prepare(SETTINGS, text_rows(), known=LabelMap(("good", "bad")))
    assert kind.prepare(SETTINGS, text_rows(), known=LabelMap(("so", "good", "bad"))).labels.names == ("so", "good", "bad")
    assert kind.prepare(SETTINGS, [], text_rows(), known=LabelMap(("so", "good", "bad"))).weights is None


def test_regression():
    rows = text_rows((1.0, -2.0, 0.5, 0.25, 3.0))
    model = made(lambda: BertForSequenceClassification(BertConfig(**ENCODER, num_labels=1, problem_type="regression")))
    task = task_named("regression")(SETTINGS, task_named("regression").prepare(SETTINGS, rows), model.config, tokenizer=PIECES)
    batch = task.collate(task.encode(rows))
    total, count = task.loss(model, batch)
    theirs = model(**batch.inputs, labels=batch.labels.double()).loss
    torch.testing.assert_close(total, theirs * count, check_dtype=False, rtol=1e-5, atol=1e-5)
    found = task.predict_all(model, task.encode(rows))
    metrics = task.metrics(found, rows)
    assert metrics["rmse"] ** 2 == pytest.approx(metrics["loss"]) == pytest.approx(float(total.detach()) / 5, rel=1e-5)
    assert set(metrics) == {"pearson", "spearman", "rmse", "mae", "loss"} and task.primary in metrics
    assert set(task.intervals(found, rows)) == set(metrics)


WORDS = [TokensRow("a:1", ("Aromi", "is", "good"), ("B-X", "O", "O")),
         TokensRow("a:2", ("the", "film", "Aromi", "shop"), ("O", "O", "B-X", "I-X"))]


def test_token_classification():
    kind = task_named("token-classification")
    targets = kind.prepare(SETTINGS, WORDS)
    model = made(lambda: BertForTokenClassification(BertConfig(**ENCODER, num_labels=3)))
    task = kind(SETTINGS, targets, model.config, tokenizer=PIECES)
    batch = task.collate(task.encode(WORDS))
    total, count = task.loss(model, batch)
    assert count == 7
    theirs = model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(total, theirs * count, check_dtype=False, rtol=1e-5, atol=1e-5)
    found = task.predict_all(model, task.encode(WORDS))
    assert [len(prediction["tags"]) for prediction in found] == [3, 4]
    metrics = task.metrics(found, WORDS)
    assert metrics["loss"] == pytest.approx(float(total.detach()) / 7, rel=1e-5)
    assert {"accuracy", "entity_f1"} <= set(metrics)
    perfect = [{"tags": list(row.tags), "loss": 0.0, "words": len(row.tags)} for row in WORDS]
    assert task.metrics(perfect, WORDS) == {"accuracy": 1, "loss": 0, "entity_precision": 1, "entity_recall": 1, "entity_f1": 1}
    assert task.tables(perfect, WORDS)["classes"] == [{"class": "X", "precision": 1, "recall": 1, "f1": 1, "support": 2}]
    half = [perfect[0], {"tags": ["O", "O", "B-X", None], "loss": 0.0, "words": 3}]
    assert task.metrics(half, WORDS)["accuracy"] == pytest.approx(6 / 7) and task.metrics(half, WORDS)["entity_f1"] == 0.5
    assert task.shown(half[1]) == "O O B-X ?"
    plain = kind(SETTINGS, Targets(LabelMap(("N", "V"))), model.config, tokenizer=PIECES)
    tagged = [TokensRow("a:1", ("the", "film"), ("N", "V"))]
    guess = [{"tags": ["N", "N"], "loss": 1.0, "words": 2}]
    assert set(plain.metrics(guess, tagged)) == {"accuracy", "loss"}
    assert [row["support"] for row in plain.tables(guess, tagged)["classes"]] == [1, 1]


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "PNG")
    return file.getvalue()


def test_image_classification():
    rows = [ImageRow("a:1", png("red"), "red"), ImageRow("a:2", png("blue"), "blue"), ImageRow("a:3", png("red"), "red")]
    kind = task_named("image-classification")
    model = made(lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=2)))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    task = kind(SETTINGS, kind.prepare(SETTINGS, rows), model.config, processor=processor)
    examples = task.encode(rows)
    assert [example.length for example in examples] == [5, 5, 5]
    batch = task.collate(examples)
    assert batch.inputs["pixel_values"].shape == (3, 3, 8, 8)
    total, count = task.loss(model, batch)
    theirs = model(batch.inputs["pixel_values"].double(), labels=batch.labels).loss
    torch.testing.assert_close(total, theirs * count, check_dtype=False)
    found = task.predict_all(model, examples)
    assert found[0]["probabilities"] == found[2]["probabilities"] != found[1]["probabilities"]
    assert set(task.metrics(found, rows)) == {"accuracy", "macro_f1", "loss"}
