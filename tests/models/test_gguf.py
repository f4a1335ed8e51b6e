import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaloom.errors import CheckpointError
from deltaloom.models import describe, load_model
from deltaloom.models.gguf import check_gguf, convert

# GPT-2's letters for bytes: "Ġ" is a space. Two spaces are one token, as in SmolLM's vocabulary.
TOKENS = ["<|endoftext|>", "<|start|>", "a", "b", "1", "2", "5", "Ġ", "ĠĠ", "Ċ", "ab", "c"]
MERGES = ["a b", "Ġ Ġ"]
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True, rope_theta=10000.0)).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's rotary order: the two halves of each head alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, *, kind=gguf.GGMLQuantizationType.F32, pre="smollm"):
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                value = interleaved(value, heads)
        named = name.removeprefix("model.").replace("layers.", "blk.").replace("embed_tokens", "token_embd")
        for ours, theirs in NAMES.items():
            named = named.replace(ours, theirs)
        named = "output_norm.weight" if named == "norm.weight" else named
        if value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(named, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(named, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def test_a_float_file_gives_the_same_logits(tmp_path):
    model = llama()
    loaded = load_model(write(tmp_path / "m.gguf", model), task="causal-lm", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=1e-6)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.notes and "pad token" in loaded.notes[0]


def test_quantised_blocks_become_plain_weights_that_train_and_save(tmp_path):
    model = llama()
    kind = gguf.GGMLQuantizationType.Q8_0
    loaded = load_model(write(tmp_path / "m.gguf", model, kind=kind), task="causal-lm", dtype=torch.float32).model
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    wanted = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert np.array_equal(loaded.model.layers[1].mlp.up_proj.weight.detach().numpy(), wanted)
    assert (logits(loaded) - logits(model)).abs().max() < 0.05
    loaded(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    assert loaded.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    loaded.save_pretrained(tmp_path / "saved")


def test_single_digits_are_split_as_the_vocabulary_was_learned(tmp_path):
    for pre, wanted in (("smollm", ["a", "ĠĠ", "5"]), ("gpt-2", ["a", "Ġ", "Ġ", "5"])):
        path = write(tmp_path / f"{pre}.gguf", llama(), pre=pre)
        tokenizer = load_model(path, task="causal-lm").tokenizer
        assert tokenizer.convert_ids_to_tokens(tokenizer("a  5").input_ids) == wanted


def test_a_converted_folder_loads_as_the_file_does(tmp_path):
    path = write(tmp_path / "m.gguf", llama())
    (tmp_path / "folder").mkdir()
    convert(path, tmp_path / "folder")
    folder = load_model(tmp_path / "folder", task="causal-lm")
    file = load_model(path, task="causal-lm", dtype=torch.bfloat16)
    assert folder.fingerprint == file.fingerprint
    assert torch.equal(logits(folder.model), logits(file.model))
    text = "ab  5\n12<|endoftext|>"
    assert folder.tokenizer(text).input_ids == file.tokenizer(text).input_ids


def test_describe_reads_the_header_alone(tmp_path):
    facts = describe(write(tmp_path / "m.gguf", llama()))
    assert facts.parameters == sum(parameter.numel() for parameter in llama().parameters())
    assert (facts.d_model, facts.layers, facts.vocabulary) == (32, 2, len(TOKENS))


def test_a_cut_file_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", llama())
    whole = path.read_bytes()
    for keep in (0, 3, 10, 200, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            load_model(path, task="causal-lm")


def test_damaged_metadata_is_an_error_of_ours_or_harmless(tmp_path):
    path = write(tmp_path / "m.gguf", llama())
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for position in random.integers(0, 1200, size=60):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            check_gguf(path)
        except CheckpointError:
            refused += 1
    assert refused > 10
