"""How the layers of each model family are called: data, not classes.

A path such as `model.layers.3.self_attn.q_proj` splits at its first number: the stack (`model.layers`), the block (3)
and the rest (`self_attn.q_proj`). A family says what each rest is. An unknown family is read by the common names below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

ATTENTION_ROLES = ("q", "k", "v", "o", "qkv")
MLP_ROLES = ("gate", "up", "down", "gate_up")
NOT_BY_ROW = ("relative_attention_bias",)  # layers whose input is (queries, keys), the same for every row of the batch
DEPTH = "num_hidden_layers"  # where a configuration counts the blocks, whatever the family calls it itself
# Lists of a configuration with one entry for each block.
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "no_rope_layer_types")
BY_NUMBER = ("scale_attn_by_inverse_layer_idx",)  # keys that make what a block computes depend on its number
# Classes with 3-D weights stored as (slices, d_in, d_out) that do not say so themselves by `is_transposed`.
TRANSPOSED_STACKS = ("Llama4TextExperts", "GroupedLinearLayer")


Before = Literal["tokens", "positions", "dropout", "all"]


@dataclass(frozen=True)
class Halves:
    """How a backbone is cut between two of its blocks; paths within the backbone (`base_model`).

    `before` is what it runs on the way to the first block: the table of tokens, a table of positions that is added, dropout,
    or all of these in one module. `norm` follows the last block. `scored` says which place of a row a classifier reads.
    """

    blocks: str
    before: dict[str, Before]
    norm: str | None
    scored: Literal["first", "last"]


@dataclass(frozen=True)
class Family:
    """Names within a block; every key and entry may hold `*`."""

    roles: dict[str, str]                         # rest of the path -> role of an affine layer
    attention: tuple[str, ...]                    # modules that call transformers' attention interface
    branches: dict[str, tuple[str, str]]          # name -> (layer that reads the sub-layer's input, layer that writes its output)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # role -> roles of its parts, in row order
    plain_head: bool = False                      # logits = head(last hidden state) and nothing after it
    halves: Halves | None = None                  # None: not cut, because it is not tested
    depths: dict[str, str] = field(default_factory=lambda: {"*": DEPTH})  # path of a stack -> key of the configuration: blocks


def _proj(attention: str, q: str, k: str, v: str, o: str) -> dict[str, str]:
    return {f"{attention}.{q}": "q", f"{attention}.{k}": "k", f"{attention}.{v}": "v", f"{attention}.{o}": "o"}


_ROTARY = Halves("layers", {"embed_tokens": "tokens"}, "norm", "last")
_LLAMA = Family(
    roles={**_proj("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
           "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"},
    attention=("self_attn",),
    branches={"attention": ("self_attn.q_proj", "self_attn.o_proj"), "mlp": ("mlp.gate_proj", "mlp.down_proj")},
    plain_head=True,
    halves=_ROTARY,
)
_LLAMA_SCALED_LOGITS = Family(_LLAMA.roles, _LLAMA.attention, _LLAMA.branches)  # softcaps or scales follow the head
_PHI = Family(
    roles={**_proj("self_attn", "q_proj", "k_proj", "v_proj", "dense"), "mlp.fc1": "up", "mlp.fc2": "down"},
    attention=("self_attn",),
    branches={"attention": ("self_attn.q_proj", "self_attn.dense"), "mlp": ("mlp.fc1", "mlp.fc2")},
    plain_head=True,
    halves=Halves("layers", {"embed_tokens": "tokens", "embed_dropout": "dropout"}, "final_layernorm", "last"),
)
_PHI3 = Family(
    roles={"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
    attention=("self_attn",),
    branches={"attention": ("self_attn.qkv_proj", "self_attn.o_proj"), "mlp": ("mlp.gate_up_proj", "mlp.down_proj")},
    fused={"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")},
    plain_head=True,
    halves=_ROTARY,
)
_GPT2 = Family(
    roles={"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    attention=("attn",),
    branches={"attention": ("attn.c_attn", "attn.c_proj"), "mlp": ("mlp.c_fc", "mlp.c_proj")},
    fused={"qkv": ("q", "k", "v")},
    plain_head=True,
    halves=Halves("h", {"wte": "tokens", "wpe": "positions", "drop": "dropout"}, "ln_f", "last"),
)
_BERT = Family(
    roles={**_proj("attention.self", "query", "key", "value", ""), "attention.output.dense": "o",
           "intermediate.dense": "up", "output.dense": "down"},
    attention=("attention.self",),
    branches={"attention": ("attention.self.query", "attention.output.dense"), "mlp": ("intermediate.dense", "output.dense")},
    halves=Halves("encoder.layer", {"embeddings": "all"}, None, "first"),
)
_DISTILBERT = Family(
    roles={**_proj("attention", "q_lin", "k_lin", "v_lin", "out_lin"), "ffn.lin1": "up", "ffn.lin2": "down"},
    attention=("attention",),
    branches={"attention": ("attention.q_lin", "attention.out_lin"), "mlp": ("ffn.lin1", "ffn.lin2")},
    halves=Halves("transformer.layer", {"embeddings": "all"}, None, "first"),
)
_T5 = Family(
    roles={**_proj("layer.*.SelfAttention", "q", "k", "v", "o"), **_proj("layer.*.EncDecAttention", "q", "k", "v", "o"),
           "layer.*.DenseReluDense.wi": "up", "layer.*.DenseReluDense.wi_0": "gate", "layer.*.DenseReluDense.wi_1": "up",
           "layer.*.DenseReluDense.wo": "down"},
    attention=("layer.*.SelfAttention",),
    branches={"attention": ("layer.*.SelfAttention.q", "layer.*.SelfAttention.o"),
              "cross_attention": ("layer.*.EncDecAttention.q", "layer.*.EncDecAttention.o"),
              "mlp": ("layer.*.DenseReluDense.wi*", "layer.*.DenseReluDense.wo")},
    depths={"*encoder.block": "num_layers", "*decoder.block": "num_decoder_layers"},
)
_BART = Family(
    roles={**_proj("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
           **_proj("encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj"), "fc1": "up", "fc2": "down"},
    attention=("self_attn",),
    branches={"attention": ("self_attn.q_proj", "self_attn.out_proj"),
              "cross_attention": ("encoder_attn.q_proj", "encoder_attn.out_proj"), "mlp": ("fc1", "fc2")},
    depths={"*encoder.layers": "encoder_layers", "*decoder.layers": "decoder_layers"},
)
_VIT = Family(
    roles={**_proj("attention", "q_proj", "k_proj", "v_proj", "o_proj"), "mlp.fc1": "up", "mlp.fc2": "down"},
    attention=("attention",),
    branches={"attention": ("attention.q_proj", "attention.o_proj"), "mlp": ("mlp.fc1", "mlp.fc2")},
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "olmo", "olmo2", "stablelm"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "cohere", "granite"), _LLAMA_SCALED_LOGITS),
    "phi": _PHI,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart"), _BART),
    **dict.fromkeys(("vit", "deit"), _VIT),
}

# What the last name of a layer usually means, for families that the table does not have.
COMMON_ROLES: dict[str, str] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "q", "wq", "query_proj", "to_q"), "q"),
    **dict.fromkeys(("k_proj", "key", "k_lin", "k", "wk", "key_proj", "to_k"), "k"),
    **dict.fromkeys(("v_proj", "value", "v_lin", "v", "wv", "value_proj", "to_v"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "o", "wo_attn", "to_out"), "o"),
    **dict.fromkeys(("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "wi_0", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "fc1", "c_fc", "wi", "wi_1", "lin1", "dense_h_to_4h", "w3", "linear1"), "up"),
    **dict.fromkeys(("down_proj", "fc2", "wo", "lin2", "dense_4h_to_h", "w2", "linear2"), "down"),
}

# The same for parameters that are layers of their own, as those of experts are.
TENSOR_ROLES: dict[str, str] = {**COMMON_ROLES, "gate_up_proj": "gate_up"}


def split_path(path: str) -> tuple[str, int | None, str]:
    """(stack, block index, rest) of a module path, split at its first number; outside of blocks the index is None."""
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1:])
    return "", None, path


def role_of(family: Family | None, rest: str) -> str:
    """Role of an affine layer inside a block; a layer that no table knows has its own last name as role."""
    leaf = rest.rsplit(".", 1)[-1]
    if family is not None:
        for pattern, role in family.roles.items():
            if fnmatchcase(rest, pattern):
                return role
        return leaf
    return COMMON_ROLES.get(leaf, leaf)


@dataclass(frozen=True)
class Widths:
    """Where a configuration says how wide the inside of a block is, where it can say another width than the usual one."""

    neurons: dict[str, str]     # path of a stack -> key: neurons of the feed-forward layer
    heads: str | None = None    # key: heads of a query; None where the width of a head follows from their number
    groups: str | None = None   # key: heads of keys and values; None where there are as many as of a query
    head: str | None = None     # key: width of a head, to be written where the number of heads changes
    by_head: str | None = None  # table in a block with one column for each head, which all blocks of the stack read


_GROUPED = Widths({"*": "intermediate_size"}, "num_attention_heads", "num_key_value_heads", "head_dim")

WIDTHS: dict[str, Widths] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "smollm3"), _GROUPED),
    "gpt2": Widths({"*": "n_inner"}),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "vit", "deit"),
                    Widths({"*": "intermediate_size"})),
    "distilbert": Widths({"*": "hidden_dim"}),
    **dict.fromkeys(("t5", "mt5"), Widths({"*": "d_ff"}, "num_heads", None, "d_kv", NOT_BY_ROW[0])),
    **dict.fromkeys(("bart", "mbart"), Widths({"*encoder.layers": "encoder_ffn_dim", "*decoder.layers": "decoder_ffn_dim"})),
}
