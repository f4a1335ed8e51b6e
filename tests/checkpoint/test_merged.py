import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from deltaloom.checkpoint.merged import save_merged
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import RefusedError
from deltaloom.tuned import attach
from tests.contract.cases import perturb
from tests.toys import LAYOUTS, toy, toy_batch

AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification,
        "t5": AutoModelForSeq2SeqLM}


@torch.no_grad()
def logits(model, layout):
    return model(**toy_batch(layout, labels=layout == "t5")).logits


def merged(layout, methods, **options):
    tuned = attach(toy(layout, **options), methods)
    perturb(tuned)
    tuned.merge()
    return tuned


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_what_was_merged(layout, tmp_path):
    tuned = merged(layout, [LoRA(rank=2)])
    with tuned.bare() as model:
        written = save_merged(model, None, tmp_path / "m")
    assert written > 0 and {path.suffix for path in (tmp_path / "m").iterdir()} <= {".json", ".safetensors"}
    again = AUTO[layout].from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(again, layout), logits(tuned, layout))
    tuned.unmerge()
    torch.testing.assert_close(logits(again, layout), logits(tuned, layout), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["embed", "lm_head"])
def test_untied_embeddings_keep_both_sides(target, tmp_path):
    """peft#2018, #2777, #2864, #2972: merged models lost their head or their embeddings."""
    model = toy("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    tuned = attach(model, [LoRA(rank=2, targets=target)])
    perturb(tuned)
    facts = tuned.merge()
    assert facts.notes
    with tuned.bare() as bare:
        save_merged(bare, None, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(logits(again, "llama"), logits(tuned, "llama"))


def test_a_trained_head_is_in_the_merged_model(tmp_path):
    """un#9331, peft#2777: trained heads and embeddings were dropped on saving."""
    tuned = merged("bert", [LoRA(rank=2), Full(targets="classifier")])
    with tuned.bare() as model:
        save_merged(model, None, tmp_path / "m")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(again, "bert"), logits(tuned, "bert"))


def test_new_biases_are_refused_and_nothing_is_written(tmp_path):
    tuned = merged("llama", [BitFit(targets="q")])
    with tuned.bare() as model, pytest.raises(RefusedError, match=r"no place .*\n.*q_proj\.bias"):
        save_merged(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["lm_head", "embed"])
def test_untied_embeddings_of_an_encoder_decoder(target, tmp_path):
    """Its configuration ties them whatever it is told; transformers keeps them apart when the values differ."""
    tuned = merged("t5", [LoRA(rank=2, targets=target)])
    with tuned.bare() as model:
        save_merged(model, None, tmp_path / "m")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(again, "t5"), logits(tuned, "t5"))


def test_what_transformers_would_load_otherwise_is_not_written(tmp_path, monkeypatch):
    tuned = merged("llama", [LoRA(rank=2)])

    def forgets(self, folder, state_dict):
        write(self, folder, state_dict={key: tensor for key, tensor in state_dict.items() if "lm_head" not in key})

    with tuned.bare() as model:
        write = type(model).save_pretrained
        monkeypatch.setattr(type(model), "save_pretrained", forgets)
        with pytest.raises(RefusedError, match=r"lm_head\.weight"):
            save_merged(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_another_type_on_disk(layout, tmp_path):
    tuned = merged(layout, [LoRA(rank=2)])
    with tuned.bare() as model:
        save_merged(model, None, tmp_path / "m", torch.bfloat16)
        expected = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    again = AUTO[layout].from_pretrained(tmp_path / "m", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert tuned.model.dtype == torch.float32


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    tuned = merged("llama", [LoRA(rank=2)])
    with tuned.bare() as model, pytest.raises(RefusedError, match="not empty"):
        save_merged(model, None, tmp_path / "m")
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"
