"""GGUF files: checked, dequantised through transformers, with the tokenizer that the file describes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaloom.errors import CheckpointError

MAGIC = b"GGUF"
# Vocabularies whose merges were learned on single digits, as llama.cpp's table of pre-tokenizers says
# (llama-vocab.cpp). transformers 5.23 splits these like GPT-2, which gives other tokens for "a  5".
SINGLE_DIGITS = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF or is cut short; reads the metadata, not the tensors.

    Raises:
        CheckpointError: with the file's name and what does not fit.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    reader = _reader(path)
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise CheckpointError(f"{path} is cut short: tensor '{tensor.name}' ends at byte {end}, the file has {size}",
                                  hint="Copy or download it again.")


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes."""
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    field = _reader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ])
    return tokenizer


def gguf_arguments(path: Path) -> dict[str, Any]:
    """What `from_pretrained` needs besides the folder to read this file into plain dense weights.

    Without `dequantize`, transformers keeps the weights packed where it finds a kernel for them, and they could not train.
    """
    return {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def convert(path: Path, folder: Path) -> None:
    """Write a causal language model as a folder that transformers loads: safetensors in bf16, config, tokenizer.

    bf16 loses nothing that matters: the values come from 4 to 8 bits with a 16 bit scale.
    """
    from deltaloom.models.quiet import quiet_transformers

    check_gguf(path)
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=torch.bfloat16, **gguf_arguments(path))
        tokenizer = gguf_tokenizer(path)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _reader(path: Path) -> Any:
    """gguf's reader; whatever it raises on damaged bytes becomes one error."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError, struct.error, OSError) as error:
        raise CheckpointError(f"{path} is a damaged GGUF file", got=f"{type(error).__name__}: {error}",
                              hint="Copy or download it again.") from error
