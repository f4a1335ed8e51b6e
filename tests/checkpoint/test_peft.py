"""Adapters go both ways between PEFT and here and compute the same, after training steps."""

import json
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaloom.checkpoint import native
from deltaloom.checkpoint.peft import CONFIG, TENSORS, load_peft, read_peft, write_peft
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.bottleneck import Bottleneck
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.full import Full
from deltaloom.deltas.ia3 import IA3
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.norms import Norms
from deltaloom.deltas.prefix import Prefix
from deltaloom.deltas.prompt import Prompt
from deltaloom.errors import CheckpointError, DeltaloomError, RefusedError
from deltaloom.tuned import Tuned, attach
from tests.toys import LAYOUTS, toy, toy_batch

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "distilbert": "SEQ_CLS",
         "t5": "SEQ_2_SEQ_LM", "llama-classifier": "SEQ_CLS"}
LINEARS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"],
           "bert": ["query", "value", "intermediate.dense"], "t5": ["q", "v", "wo"],
           "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "llama-classifier": ["q_proj"]}
FEED_FORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["intermediate.dense"], "t5": ["wo"]}
NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"], "t5": ["layer_norm"]}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "embed_tokens"}
FIRST = {"llama": "layers.0.self_attn.q_proj", "gpt2": "h.0.attn.c_attn", "bert": "layer.0.attention.self.query",
         "t5": "block.0.layer.0.SelfAttention.q"}


def batch(layout, **options):
    return toy_batch(layout, **options)


@torch.no_grad()
def logits(model, layout):
    model.eval()
    found = model(**batch(layout, labels=layout == "t5")).logits
    return found[:, -7:] if found.ndim == 3 else found  # PEFT leaves the rows of a prompt in


def steps(model, layout, count=3):
    torch.manual_seed(0)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(count):
        model(**batch(layout)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def peft_configs(layout):
    linear = {"r": 3, "lora_alpha": 7, "target_modules": LINEARS[layout]}
    first = FIRST[layout]
    found = {
        "lora": peft.LoraConfig(**linear),
        "rslora": peft.LoraConfig(**linear, use_rslora=True),
        "dropout": peft.LoraConfig(**linear, lora_dropout=0.1),
        "patterns": peft.LoraConfig(**linear, rank_pattern={first: 2, LINEARS[layout][-1]: 5}, alpha_pattern={first: 9}),
        "rs patterns": peft.LoraConfig(**linear, use_rslora=True, rank_pattern={f"^.*{first}": 2}, alpha_pattern={"q.*": 3}
                                       if layout in ("llama", "bert", "t5") else {}),
        "regex": peft.LoraConfig(r=2, target_modules=rf".*\.({'|'.join(n.split('.')[-1] for n in LINEARS[layout][:1])})"),
        "dora": peft.LoraConfig(**linear, use_dora=True),
        "dora patterns": peft.LoraConfig(**linear, use_dora=True, rank_pattern={first: 2}),
        "gaussian": peft.LoraConfig(**linear, init_lora_weights="gaussian"),
        "embedding": peft.LoraConfig(r=2, target_modules=[EMBEDDINGS[layout], LINEARS[layout][0]]),
        "ia3": peft.IA3Config(target_modules=LINEARS[layout], feedforward_modules=FEED_FORWARD[layout]),
        "norms": peft.LNTuningConfig(target_modules=NORMS[layout]),
    }
    if layout in ("gpt2", "bert"):
        found["bias all"] = peft.LoraConfig(**linear, bias="all")
        found["bias lora_only"] = peft.LoraConfig(**linear, bias="lora_only")
        found["dora bias"] = peft.LoraConfig(**linear, bias="lora_only", use_dora=True)
    if layout in ("llama", "gpt2"):
        found["modules_to_save"] = peft.LoraConfig(**linear, modules_to_save=["lm_head"])
        found["norms saved"] = peft.LoraConfig(**linear, modules_to_save=[NORMS[layout][1]])
    if layout != "t5":
        found["prefix"] = peft.PrefixTuningConfig(num_virtual_tokens=3)
        found["prompt"] = peft.PromptTuningConfig(num_virtual_tokens=3)
    for config in found.values():
        config.task_type = TASKS[layout]
    return found


def peft_trained(layout, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(toy(layout), config)
        steps(model, layout)
    return model


def peft_saved(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


def peft_loaded(layout, folder):
    """PEFT's own reading; any warning about names is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(toy(layout), str(folder)).eval()
    messages = [str(warning.message) for warning in caught]
    assert not [message for message in messages if "missing" in message or "unexpected" in message], messages
    return model


CASES = [(layout, name) for layout in LAYOUTS for name in peft_configs(layout)]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_what_peft_trained_computes_the_same_here_and_there_again(layout, name, tmp_path):
    model = peft_trained(layout, peft_configs(layout)[name])
    expected = logits(model, layout)
    assert (expected - logits(toy(layout), layout)).abs().max() > 1e-3
    tuned = load_peft(toy(layout), peft_saved(model, tmp_path / "theirs"))
    torch.testing.assert_close(logits(tuned, layout), expected, rtol=1e-5, atol=1e-5)
    write_peft(tuned, tmp_path / "ours")
    torch.testing.assert_close(logits(peft_loaded(layout, tmp_path / "ours"), layout), expected, rtol=1e-5, atol=1e-5)
    theirs, ours = (load_file(tmp_path / side / TENSORS) for side in ("theirs", "ours"))
    copies = {key for key in theirs if key.endswith("base_layer.weight")}  # of embeddings; nothing changes them
    heads = {key for key in (ours | theirs) if "classifier" in key}  # PEFT's `bias="all"` writes them several times
    assert ours.keys() - heads == theirs.keys() - copies - heads
    native.save(tuned, tmp_path / "native")
    assert torch.equal(logits(native.load(toy(layout), tmp_path / "native"), layout), logits(tuned, layout))


OURS = {
    "lora": [LoRA(rank=3, alpha=5)],
    "patterns": [LoRA(rank=3, rank_pattern={"q": 2, r"layers?\.1.*": 4}, alpha_pattern={"q": 3.5}, rslora=True)],
    "parts": [LoRA(rank=2, targets=("q", "v"), rank_pattern={"q": 4})],
    "pissa": [LoRA(rank=3, init="pissa")],
    "rs pissa": [LoRA(rank=3, init="pissa", rslora=True)],
    "dora": [DoRA(rank=3)],
    "ia3": [IA3()],
    "norms": [Norms()],
    "lora and head": [LoRA(rank=2, targets=("q", "down")), Full(targets="head")],
    "lora and bias": [LoRA(rank=2, targets="attention"), BitFit(new=False)],
    "lora and some bias": [LoRA(rank=2, targets="attention"), BitFit(targets="o")],
    "embed": [LoRA(rank=2, targets=("embed", "q"))],
    "all-linear": [LoRA(rank=2)],
}
OUR_CASES = [(layout, name) for layout in LAYOUTS for name in OURS if layout in ("gpt2", "bert") or "bias" not in name]


@pytest.mark.parametrize(("layout", "name"), OUR_CASES)
def test_what_was_trained_here_computes_the_same_in_peft(layout, name, tmp_path):
    methods = OURS[name]
    if name == "patterns" and layout != "llama":
        methods = [LoRA(rank=3, rank_pattern={"down": 2}, alpha_pattern={"down": 3.5}, rslora=True)]
    tuned = attach(toy(layout), methods)
    steps(tuned, layout)
    expected = logits(tuned, layout)
    assert (expected - logits(toy(layout), layout)).abs().max() > 1e-3
    write_peft(tuned, tmp_path / "a", source="org/base")
    torch.testing.assert_close(logits(peft_loaded(layout, tmp_path / "a"), layout), expected, rtol=1e-5, atol=1e-5)
    again = load_peft(toy(layout), tmp_path / "a")
    torch.testing.assert_close(logits(again, layout), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("layout", ["bert", "roberta", "distilbert", "llama-classifier"])
@pytest.mark.parametrize("methods", [[LoRA(rank=2, targets="q")], [Norms()], [LoRA(rank=2, targets="q"), Full(targets="head")]],
                         ids=["lora", "norms", "lora and head"])
def test_classifiers_keep_their_heads(layout, methods, tmp_path):
    """peft#577, #602, #756, #876, st#3980: heads neither saved nor restored; #3755: names that match by their end."""
    tuned = attach(toy(layout), methods)
    steps(tuned, layout)
    write_peft(tuned, tmp_path / "a")
    other = toy(layout)
    if len(methods) > 1:
        with torch.no_grad():
            for path, module in other.named_modules():
                if path.endswith(("classifier", "score")):
                    for parameter in module.parameters():
                        parameter.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(other, str(tmp_path / "a"))
    torch.testing.assert_close(logits(theirs, layout), logits(tuned, layout), rtol=1e-5, atol=1e-5)
    again = load_peft(toy(layout), tmp_path / "a")
    torch.testing.assert_close(logits(again, layout), logits(tuned, layout), rtol=1e-5, atol=1e-5)
    assert (again.counts()[1] > 0) == (len(methods) > 1)


@pytest.mark.parametrize("layout", ["roberta", "distilbert", "llama-classifier"])
def test_a_classifier_of_peft_comes_with_its_head(layout, tmp_path):
    model = peft_trained(layout, peft.LoraConfig(r=2, target_modules=LINEARS[layout], task_type="SEQ_CLS"))
    tuned = load_peft(toy(layout), peft_saved(model, tmp_path / "a"))
    torch.testing.assert_close(logits(tuned, layout), logits(model, layout), rtol=1e-5, atol=1e-5)
    assert tuned.counts()[1] > 0


def test_several_adapters_of_peft_on_one_base(tmp_path):
    expected = {}
    for name, config in (("one", peft.LoraConfig(r=2, target_modules=["q_proj"])),
                         ("two", peft.IA3Config(target_modules=["k_proj"]))):
        config.task_type = "CAUSAL_LM"
        model = peft_trained("llama", config)
        peft_saved(model, tmp_path / name)
        expected[name] = logits(model, "llama")
    tuned = load_peft(toy("llama"), tmp_path / "one", "one")
    load_peft(tuned, tmp_path / "two", "two")
    for name, expect in expected.items():
        with tuned.use(name):
            torch.testing.assert_close(logits(tuned, "llama"), expect, rtol=1e-5, atol=1e-5)


def test_pissa_leaves_the_base_to_others():
    """peft#2184: PiSSA changed the base in place, and every other adapter on it was garbage."""
    model = toy("llama")
    alone = attach(toy("llama"), [LoRA(rank=2)], seed=1)
    steps(alone, "llama")
    tuned = attach(model, [LoRA(rank=3, init="pissa")], "pissa")
    steps(tuned, "llama")
    tuned.add("other", [LoRA(rank=2)])
    tuned.load_delta_state(alone.delta_state(), "other")
    assert torch.equal(logits(tuned, "llama"), logits(alone, "llama"))


# ---- what cannot be held -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("methods", "match"), [
    ([Bottleneck()], "no counterpart"),
    ([LoRA(rank=2), IA3()], "one method in an adapter"),
    ([LoRA(rank=2), Prefix(length=2)], "one method in an adapter"),
    ([Full(targets="lm_head")], "none of these methods"),
    ([BitFit()], "no new ones"),
    ([LoRA(rank=2, targets="lm_head"), Full(targets="lm_head")], "replace a layer"),
    ([Prompt(length=2), BitFit(new=True)], "no new ones"),
])
def test_compositions_that_peft_cannot_hold(methods, match, tmp_path):
    tuned = attach(toy("llama"), methods)
    with pytest.raises(RefusedError, match=match):
        write_peft(tuned, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_bias_beside_a_method_without_it(tmp_path):
    with pytest.raises(RefusedError, match="has no 'bias'"):
        write_peft(attach(toy("bert"), [IA3(), BitFit()]), tmp_path / "a")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = peft_trained("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    peft_saved(model, folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def put(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / TENSORS)
    return folder


@pytest.mark.parametrize(("fields", "match"), [
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"peft_type": "LORAA"}, "Did you mean 'LORA'"),
    ({"peft_type": None}, "no peft_type"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"lora_bias": True}, "lora_bias"),
    ({"use_bdlora": {"a": 1}}, "use_bdlora"),
    ({"from_the_future": 1}, "from_the_future"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"init_lora_weights": {"a": 1}}, "initialisation"),
    ({"r": 3}, "rank 3 by adapter_config.json, 2 in the tensors"),
    ({"rank_pattern": {"q_proj": 4}}, "rank 4"),
    ({"r": -1}, "rank"),
    ({"r": "two"}, "rank"),
    ({"lora_alpha": None}, "alpha"),
    ({"lora_alpha": float("1e400")}, "JSON"),
    ({"rank_pattern": {"(.*)*x": 4}}, "repeats"),
    ({"rank_pattern": {"[": 4}}, "regular expression"),
    ({"alpha_pattern": {"a" * 600: 4}}, "longer"),
    ({"rank_pattern": [1]}, "must be a mapping"),
    ({"modules_to_save": ["nothing"]}, "modules_to_save"),
    ({"modules_to_save": 3}, "modules_to_save"),
])
def test_fields_that_change_the_meaning_are_refused_by_name(adapter, fields, match, tmp_path):
    config, tensors = adapter
    model = toy("llama")
    with pytest.raises(DeltaloomError, match=match):
        load_peft(model, put(tmp_path / "a", config | fields, tensors))
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())


def rename(tensors, change):
    return {change(key): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(("change", "match"), [
    (lambda t: t | {"base_model.model.extra.weight": torch.zeros(2)}, "does not explain"),
    (lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": torch.zeros(16)}, "does not explain"),
    (lambda t: rename(t, lambda key: key.replace("lora_A", "lora_a")), "pairs"),
    (lambda t: rename(t, lambda key: key.replace("lora_", "lara_")), "no lora_A"),
    (lambda t: rename(t, lambda key: key.replace("layers.1", "layers.7")), "cannot carry"),
    (lambda t: rename(t, lambda key: key.removeprefix("base_model.model.")), "no adapter of PEFT"),
    (lambda t: dict(list(t.items())[1:]), "pairs"),
    (lambda t: {key: torch.zeros(0) for key in t}, "not a pair"),
    (lambda t: {key: tensor[:, :5].contiguous() if "lora_A" in key else tensor for key, tensor in t.items()}, "does not fit"),
    (lambda t: {key: tensor * float("nan") for key, tensor in t.items()}, "not finite"),
    (lambda t: {}, "no lora_A"),
])
def test_tensors_that_do_not_fit_are_refused(adapter, change, match, tmp_path):
    """peft#2115 and peft.md 5.5: extra and misspelled tensors loaded nothing and nobody said so."""
    config, tensors = adapter
    with pytest.raises(CheckpointError, match=match):
        load_peft(toy("llama"), put(tmp_path / "a", config, change(tensors)))


def test_a_layer_that_is_lost_as_a_whole_is_missed(adapter, tmp_path):
    """peft#2115, accelerate#4206: what a file lacks stayed as it was at birth."""
    config, tensors = adapter
    half = {key: tensor for key, tensor in tensors.items() if "layers.0." in key}
    with pytest.raises(CheckpointError, match=r"no tensors(.|\n)*layers\.1\.self_attn\.q_proj"):
        load_peft(toy("llama"), put(tmp_path / "a", config, half))
    for meant in ({"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}):
        load_peft(toy("llama"), put(tmp_path / "b", config | meant, half))


def test_other_bases_and_pickles(adapter, tmp_path):
    config, tensors = adapter
    folder = put(tmp_path / "a", config, tensors)
    with pytest.raises(CheckpointError, match="cannot carry"):
        load_peft(toy("gpt2"), folder)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(RefusedError, match="pickle"):
        load_peft(toy("llama"), folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load_peft(toy("llama"), folder)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_peft(toy("llama"), tmp_path / "nothing")
    (folder / TENSORS).write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="safetensors"):
        load_peft(toy("llama"), folder)


def test_changed_embeddings_beside_an_adapter_are_refused(tmp_path):
    model = peft_trained("llama", peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    peft_saved(model, tmp_path / "a")
    with pytest.raises(RefusedError, match="differ from this base"):
        load_peft(toy("llama", seed=4), tmp_path / "a")


def test_changed_buffers_of_saved_modules_are_refused(tmp_path):
    def with_counter(count):
        model = toy("bert")
        model.classifier.register_buffer("counter", torch.tensor(count))
        return model

    tuned = attach(with_counter(1), [LoRA(rank=2, targets="q"), Full(targets="classifier")])
    write_peft(tuned, tmp_path / "a")
    assert torch.equal(logits(load_peft(with_counter(1), tmp_path / "a"), "bert"), logits(tuned, "bert"))
    with pytest.raises(RefusedError, match="buffers"):
        load_peft(with_counter(2), tmp_path / "a")


def test_a_merged_delta_is_not_written(tmp_path):
    tuned = attach(toy("llama"), [LoRA(rank=2)])
    steps(tuned, "llama")
    tuned.merge()
    with pytest.raises(RefusedError, match="merged"):
        write_peft(tuned, tmp_path / "a")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=8)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_value_in_any_field(adapter, tmp_path_factory, data):
    config, tensors = adapter
    field = data.draw(st.sampled_from(sorted(config)) | st.text(max_size=5))
    folder = put(tmp_path_factory.getbasetemp() / "fuzz-peft", config | {field: data.draw(JSON)}, tensors)
    try:
        tuned = load_peft(toy("llama"), folder)
    except DeltaloomError:
        return
    assert isinstance(tuned, Tuned)


def test_odd_json(adapter, tmp_path):
    _, tensors = adapter
    for text in ("", "[]", "[" * 100_000, '{"peft_type": "LORA", "peft_type": "LORA"}', '{"r": NaN}',
                 '{"r": ' + "9" * 5000 + "}"):
        with pytest.raises(CheckpointError):
            read_peft(put(tmp_path / "a", text, tensors), toy("llama"))
