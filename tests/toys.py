"""Tiny random models of every layout, made from configurations: no download, hidden size 16, two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 64
LAYOUTS = ("llama", "gpt2", "bert", "t5")
MORE_LAYOUTS = ("phi", "phi3", "qwen3", "gemma", "roberta", "distilbert", "bart", "vit", "llama-classifier")


def toy(layout: str, seed: int = 0, dtype: torch.dtype = torch.float32, blocks: int = 2) -> nn.Module:
    """A tiny model in evaluation mode with random weights (larger than the library's, so that changes show)."""
    import transformers as t

    decoder = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": blocks,
               "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    encoder = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": blocks,
               "num_attention_heads": 4, "num_labels": 3, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
               "attention_probs_dropout_prob": 0.0}
    no_drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)),
        "llama-classifier": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**decoder, num_labels=3)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**decoder, head_dim=4)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**decoder, head_dim=4)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**decoder)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**(decoder | {"num_key_value_heads": 4}))),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=blocks, n_head=4, bos_token_id=1,
                                                       eos_token_id=2, n_positions=64, **no_drop)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**encoder)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**(encoder | {"pad_token_id": 1}))),
        "distilbert": lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(
            vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=blocks, n_heads=4, num_labels=3, dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=blocks, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=blocks, decoder_layers=blocks, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, max_position_embeddings=64)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=blocks, num_attention_heads=4, image_size=8, patch_size=4,
            num_channels=1, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    }
    torch.manual_seed(seed)
    model = makers[layout]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model.eval().to(dtype)


def quantised_toy(layout: str, codec: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model with the linears inside its blocks quantised."""
    from deltaloom.compact import codec_from
    from deltaloom.models.compact import quantise_model

    return quantise_model(toy(layout, seed, dtype), codec_from(codec))


def toy_batch(layout: str, rows: int = 3, time: int = 7, seed: int = 1, labels: bool = True) -> dict[str, Tensor]:
    """Inputs that fit the layout, with labels."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "vit":
        batch = {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator)}
    else:
        batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, time), generator=generator)}
    if labels:
        classes = layout in ("bert", "roberta", "distilbert", "vit", "llama-classifier")
        batch["labels"] = (torch.arange(rows) % 3 if classes
                           else torch.randint(3, VOCABULARY, (rows, time), generator=generator))
    return batch
