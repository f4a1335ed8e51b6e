"""Tiny random models saved to folders, with a tokenizer of a few words."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

WORDS = ["<pad>", "<unk>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "dog"]


def tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", **special)


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=32, max_position_embeddings=32))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                          bos_token_id=2, eos_token_id=2))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                                            num_key_value_heads=2, intermediate_size=32, max_position_embeddings=32,
                                            tie_word_embeddings=True, bos_token_id=2, eos_token_id=2))
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2,
                                                   decoder_start_token_id=0))
    assert kind == "vit"
    return ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                              image_size=8, patch_size=4))


def save(kind: str, folder: Path, *, pad: bool = True, shard: str | None = None) -> Path:
    """The folder, with weights, config and tokenizer (or image processor)."""
    made = model(kind)
    made.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if kind == "vit":
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        tokenizer(pad).save_pretrained(folder)
    return folder
