import pytest
import torch

from deltaloom.errors import RefusedError
from deltaloom.models import fingerprint, load_model, meta_model
from deltaloom.models.identity import SAMPLE
from tests.models import tiny

TASKS = {"bert": ["sequence-classification", "token-classification", "regression"],
         "gpt2": ["causal-lm", "sequence-classification"], "llama": ["causal-lm", "sequence-classification"],
         "t5": ["seq2seq-lm", "sequence-classification"]}


@pytest.mark.parametrize("kind", TASKS)
def test_task_and_dtype_do_not_matter(kind, tmp_path):
    folder = tiny.save(kind, tmp_path)
    prints = {load_model(folder, task=task, dtype=dtype,
                         labels=["a", "b", "c"] if task.endswith("classification") else None).fingerprint
              for task in TASKS[kind] for dtype in (torch.float32, torch.bfloat16)}
    assert len(prints) == 1


@pytest.mark.parametrize("kind", TASKS)
def test_any_parameter_of_a_small_backbone_matters(kind):
    model = tiny.model(kind)
    before, seen = fingerprint(model), set()
    for name, parameter in model.base_model.named_parameters():
        if name.startswith("pooler."):
            continue
        with torch.no_grad():
            old = parameter.view(-1)[-1].item()
            parameter.view(-1)[-1] = old + 1
            seen.add(fingerprint(model))
            parameter.view(-1)[-1] = old
    assert before not in seen and fingerprint(model) == before


def test_heads_and_poolers_do_not_matter():
    model = tiny.model("bert")
    before = fingerprint(model)
    torch.nn.init.ones_(model.pooler.dense.weight)
    assert fingerprint(model) == before


def test_names_and_shapes_matter():
    class Toy(torch.nn.Module):
        def __init__(self, name, *shape):
            super().__init__()
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(*shape)))

    prints = {fingerprint(Toy("a", 2, 3)), fingerprint(Toy("a", 3, 2)), fingerprint(Toy("b", 2, 3))}
    assert len(prints) == 3


def test_of_a_large_parameter_only_a_spread_sample_is_read():
    model = torch.nn.Linear(100, 1000, bias=False)
    stride = model.weight.numel() // SAMPLE
    before = fingerprint(model)
    with torch.no_grad():
        model.weight.view(-1)[1] += 1
        assert stride > 1 and fingerprint(model) == before
        model.weight.view(-1)[stride] += 1
    assert fingerprint(model) != before


def test_unloaded_weights_have_none(tmp_path):
    with pytest.raises(RefusedError, match="without loaded weights"):
        fingerprint(meta_model(tiny.save("bert", tmp_path), task="regression"))
