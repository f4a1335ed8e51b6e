import pytest
import torch

from deltaloom import attention
from deltaloom.private.cut import split
from deltaloom.private.replay import packed, run_back, run_front
from tests.toys import toy

TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "qwen3": "causal-lm", "gemma": "causal-lm", "phi": "causal-lm",
         "phi3": "causal-lm", "bert": "sequence-classification", "roberta": "sequence-classification",
         "distilbert": "sequence-classification", "llama-classifier": "sequence-classification"}


def rows(layout, masked):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (3, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
    return ({"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}), (7, 4, 5)


@pytest.mark.parametrize("layout", TASKS)
def test_front_and_back_give_the_whole_models_states_and_gradients_bit_for_bit(layout):
    model = toy(layout)
    attention.install(model)
    front, back = split(model, TASKS[layout], 1)
    for kind in ("padded", "masked"):
        if kind == "padded" and not front.is_decoder:
            continue
        inputs, lengths = rows(layout, kind == "masked")
        real = torch.arange(7) < torch.tensor(lengths)[:, None]
        table = model.get_input_embeddings().weight
        found = []
        for halves in (False, True):
            weight = table.detach().clone().requires_grad_()
            owner = front.model if halves else model
            owner.get_input_embeddings().weight = torch.nn.Parameter(weight.detach().clone())
            trained = owner.get_input_embeddings().weight
            hidden = run_front(owner, inputs, front.is_decoder)
            if halves:
                hidden = run_back(back.model, packed(hidden, kind, lengths), lengths, (0, 0, 0), kind, back.is_decoder)
            (hidden[real] ** 2).sum().backward()
            found.append((hidden[real].detach(), trained.grad))
            owner.get_input_embeddings().weight = torch.nn.Parameter(table.detach(), requires_grad=False)
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
