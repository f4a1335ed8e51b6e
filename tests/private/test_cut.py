import pytest
import torch

from deltaloom import attention
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.private.back import Back
from deltaloom.private.cut import split
from deltaloom.private.replay import packed, run_back, run_front
from tests.private.pieces import three_blocks
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


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("layout", ["smollm3", "mistral", "gpt2"])
def test_any_cut_and_what_is_listed_by_block(layout, cut):
    import transformers as t

    common = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = {"smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**common, no_rope_layers=[1, 0, 1, 0])),
             "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**common, sliding_window=4)),
             "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=4, bos_token_id=1,
                                                            eos_token_id=2))}[layout]().eval()
    front, back = split(model, "causal-lm", cut)  # tried there on a few tokens
    assert (front.model.config.num_hidden_layers, back.model.config.num_hidden_layers) == (cut, 4 - cut)
    assert front.blocks == back.blocks == 4
    assert sum(p.numel() for half in (front, back) for p in half.model.parameters()) >= sum(p.numel() for p in model.parameters())


def test_what_cannot_be_cut_is_refused_and_left_alone():
    model = three_blocks("llama")
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    for cut in (0, 2, -1):
        with pytest.raises(SettingsError, match="at least one block"):
            split(model, "causal-lm", cut)
    with pytest.raises(SettingsError, match="tasks only"):
        split(model, "token-classification", 1)
    with pytest.raises(RefusedError, match="cannot be cut in two"):
        split(toy("t5"), "causal-lm", 1)
    assert before == {name: id(tensor) for name, tensor in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_counts_its_blocks_is_refused():
    import transformers as t

    config = t.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
                          scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(RefusedError, match="front and back of this model do not give"):
        split(t.GPT2LMHeadModel(config), "causal-lm", 1)


def test_a_front_has_no_head_and_a_back_no_tokens():
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    with pytest.raises(RefusedError, match="lm_head"):
        front.model(input_ids=torch.tensor([[3]]))
    with pytest.raises(RefusedError, match="embed_tokens"):
        back.model(input_ids=torch.tensor([[3]]))
    with pytest.raises(RefusedError, match="serves a back"):
        Back(front)
