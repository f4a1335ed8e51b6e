import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaloom.checkpoint import native
from deltaloom.checkpoint.header import read_header, read_values
from deltaloom.checkpoint.merged import save_merged
from deltaloom.checkpoint.peft import write_peft
from deltaloom.checkpoint.record import RECORD, TENSORS, delta_file_facts
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import CheckpointError, DeltaloomError, RefusedError, SettingsError
from deltaloom.models.identity import fingerprint
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import all_cases, perturb, steps
from tests.toys import toy, toy_batch

BASE = {"source": "toy", "task": "causal-lm", "fingerprint": "f" * 64}


@torch.no_grad()
def logits(model, layout="llama", seed=1):
    return model(**toy_batch(layout, labels=layout == "t5", seed=seed)).logits


def tuned_llama(*methods, seed=0):
    tuned = attach(toy("llama"), list(methods) or [LoRA(rank=2, targets="attention")], seed=seed)
    perturb(tuned, seed=seed)
    return tuned


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_saved_and_loaded_it_is_the_same_to_the_last_bit(case, tmp_path):
    tuned = case.tuned()
    perturb(tuned)
    expected = logits(tuned, case.layout)
    written = native.save(tuned, tmp_path / "delta", base=BASE | {"labels": ["a", "b"]}, data={"rows": 3}, seed=7)
    assert written == sum(file.stat().st_size for file in (tmp_path / "delta").iterdir())
    again = native.load(toy(case.layout), tmp_path / "delta", fingerprint="f" * 64)
    assert torch.equal(logits(again, case.layout), expected)
    assert again.saved().methods == tuned.saved().methods
    first, second = tuned.delta_state(), again.delta_state()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert {id(p) for p in again.parameters() if p.requires_grad} == {id(p) for p in again.delta_parameters().values()}
    facts = delta_file_facts(tmp_path / "delta")
    fixed = "pissa" in case.id or case.name == "route"  # these keep numbers that are not trained
    assert facts.parameters == sum(p.numel() for p in tuned.delta_parameters().values()) or fixed
    assert facts.record.seed == 7 and facts.record.data == {"rows": 3} and facts.record.base.labels == ["a", "b"]
    assert [site.site for site in facts.record.sites] == [site.name for site, _ in tuned.pairs()]
    assert sum(site.parameters for site in facts.record.sites) >= facts.parameters or tuned.shared


def test_heads_are_flagged_and_come_back(tmp_path):
    """peft#577, #602, #756, #876: classifier heads were neither saved nor restored."""
    tuned = attach(toy("bert"), [LoRA(rank=2)], heads=[Full(targets="classifier")])
    perturb(tuned)
    expected = logits(tuned, "bert")
    native.save(tuned, tmp_path / "d")
    other = toy("bert")
    with torch.no_grad():
        other.classifier.weight.normal_()  # as when a task's model is made from a plain encoder
        other.classifier.bias.normal_()
    again = native.load(other, tmp_path / "d")
    assert torch.equal(logits(again, "bert"), expected)
    assert [method.head for method in delta_file_facts(tmp_path / "d").record.methods] == [False, True]
    assert again.counts() == tuned.counts()


def test_several_deltas_on_one_base(tmp_path):
    expected = []
    for seed in (1, 2):
        tuned = tuned_llama(LoRA(rank=seed), seed=seed)
        expected.append(logits(tuned))
        native.save(tuned, tmp_path / str(seed))
    tuned = native.load(toy("llama"), tmp_path / "1", "one")
    assert native.load(tuned, tmp_path / "2", "two") is tuned and tuned.name == "two"
    for name, logit in zip(("one", "two"), expected, strict=True):
        with tuned.use(name):
            assert torch.equal(logits(tuned), logit)


def test_a_name_within_other_names_does_no_harm(tmp_path):
    """peft#2699, #2773: an adapter called 'lora' or like a layer broke its keys and loaded nothing."""
    for name in ("lora", "q_proj", "weight", "default", "0"):
        tuned = attach(toy("llama"), [LoRA(rank=2)], name)
        perturb(tuned, name)
        native.save(tuned, tmp_path / name)
        again = native.load(toy("llama"), tmp_path / name, name)
        assert torch.equal(logits(again), logits(tuned))


def test_loading_twice_under_one_name_is_refused(tmp_path):
    """peft#2115, #2295; lerobot#3459: nested adapters, or a trained one replaced by a new one, without a word."""
    native.save(tuned_llama(), tmp_path / "d")
    tuned = native.load(toy("llama"), tmp_path / "d")
    before = logits(tuned)
    with pytest.raises(RefusedError, match="attached already"):
        native.load(tuned, tmp_path / "d")
    with pytest.raises(RefusedError, match="carries deltas already"):
        native.load(tuned.model, tmp_path / "d")
    assert torch.equal(logits(tuned), before) and list(tuned.lanes) == ["default"]


def test_a_loaded_delta_trains_on(tmp_path):
    """peft#282: loaded adapters were frozen by default, and training went on with nothing to train."""
    native.save(tuned_llama(LoRA(rank=2), DoRA(rank=2, targets="mlp")), tmp_path / "d")
    tuned = native.load(toy("llama"), tmp_path / "d")
    tuned(**toy_batch("llama")).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.delta_parameters().values())


def test_sites_are_those_that_were_saved_whatever_targets_match_now(tmp_path):
    tuned = tuned_llama(LoRA(rank=2, targets="q_proj"))
    native.save(tuned, tmp_path / "d")
    record = json.loads((tmp_path / "d" / RECORD).read_text())
    record["methods"][0]["settings"]["targets"] = "all-linear"
    (tmp_path / "d" / RECORD).write_text(json.dumps(record))
    again = native.load(toy("llama"), tmp_path / "d")
    assert [site.name for site, _ in again.pairs()] == [site.name for site, _ in tuned.pairs()]
    assert torch.equal(logits(again), logits(tuned))


def test_another_base_is_refused_with_both_fingerprints(tmp_path):
    tuned = tuned_llama()
    native.save(tuned, tmp_path / "d")
    other = toy("llama", seed=5)
    with pytest.raises(CheckpointError) as caught:
        native.load(other, tmp_path / "d")
    with tuned.bare() as model:
        assert fingerprint(model) in str(caught.value) and fingerprint(other) in str(caught.value)
    assert all(parameter.requires_grad for parameter in other.parameters())
    native.load(other, tmp_path / "d", strict=False)


def test_another_size_of_model_lists_what_does_not_fit(tmp_path):
    """peft#2071: size mismatches without a word on which setting differs."""
    native.save(tuned_llama(), tmp_path / "d", base=BASE)
    with pytest.raises(CheckpointError, match="not in this model") as caught:
        native.load(toy("gpt2"), tmp_path / "d", strict=False)
    assert "self_attn.q_proj" in str(caught.value)
    record = json.loads((tmp_path / "d" / RECORD).read_text())
    record["methods"][0]["settings"]["rank"] = 3
    (tmp_path / "d" / RECORD).write_text(json.dumps(record))
    model = toy("llama")
    with pytest.raises(CheckpointError, match=r"\(2, 16\) in the file, \(3, 16\) here"):
        native.load(model, tmp_path / "d", strict=False)
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())


def test_a_merged_delta_is_not_saved_as_if_it_were_not(tmp_path):
    tuned = tuned_llama()
    tuned.merge()
    with pytest.raises(RefusedError, match="merged"):
        native.save(tuned, tmp_path / "d")


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    tuned = tuned_llama()
    native.save(tuned, tmp_path / "d")
    with pytest.raises(RefusedError, match="not empty"):
        native.save(tuned, tmp_path / "d")
    perturb(tuned, seed=3)
    native.save(tuned, tmp_path / "d", replace=True)
    assert torch.equal(logits(native.load(toy("llama"), tmp_path / "d")), logits(tuned))
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_stop_in_the_middle_leaves_no_folder(tmp_path, monkeypatch):
    tuned = tuned_llama()

    def stop(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        native.save(tuned, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    tuned = tuned_llama()
    parameter = next(iter(tuned.delta_parameters().values()))
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    with pytest.raises(RefusedError, match="not finite"):
        native.save(tuned, tmp_path / "d")


def test_empty_tensors_are_not_saved(tmp_path):
    """peft#286, #453: files of 443 bytes with tensors of size 0, at the end of training spread over processes."""
    tuned = tuned_llama()
    parameter = next(iter(tuned.delta_parameters().values()))
    parameter.data = torch.zeros(0)
    for write in (native.save, write_peft):
        with pytest.raises(RefusedError, match=r"empty(.|\n)*q_proj"):
            write(tuned, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_the_network_of_a_prefix_is_saved_and_trains_on(tmp_path):
    """peft#1607, #2043: its layers were gone after saving."""
    tuned = attach(toy("llama"), [Prefix(length=3, reparametrise=5)])
    steps(tuned, toy_batch("llama"), 2)
    native.save(tuned, tmp_path / "d")
    again = native.load(toy("llama"), tmp_path / "d")
    for one in (tuned, again):
        steps(one, toy_batch("llama"), 2)
    assert torch.equal(logits(again), logits(tuned))
    assert {"inner.weight", "outer.weight", "table"} <= {key.rsplit(":", 1)[1] for key in again.delta_parameters()}


def test_saving_needs_no_network(tmp_path, monkeypatch):
    """peft#1452: saving asked the hub and failed at the end of a run."""
    import socket

    def no(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    tuned = tuned_llama(LoRA(rank=2, targets=("embed", "q")))
    tuned.model.config.name_or_path = "some-organisation/some-model"
    native.save(tuned, tmp_path / "d")
    write_peft(tuned, tmp_path / "p", source="some-organisation/some-model")
    tuned.merge()
    with tuned.bare() as model:
        save_merged(model, None, tmp_path / "m")


def test_shared_tensors_are_written_once(tmp_path):
    tuned = attach(toy("gpt2"), [Full(targets=("wte", "lm_head"))])
    perturb(tuned)
    native.save(tuned, tmp_path / "d")
    facts = delta_file_facts(tmp_path / "d")
    assert len(facts.header.tensors) == 1 and len(facts.record.tensors.same) == 1
    again = native.load(toy("gpt2"), tmp_path / "d")
    assert torch.equal(logits(again, "gpt2"), logits(tuned, "gpt2"))


@torch.no_grad()
def test_facts_of_sites_are_those_of_dense_matrices(tmp_path):
    tuned = tuned_llama(LoRA(rank=2, targets="q"), BitFit(targets="q"), DoRA(rank=2, targets="mlp"))
    native.save(tuned, tmp_path / "d")
    found = {(site.site, site.method): site for site in delta_file_facts(tmp_path / "d").record.sites}
    for site, delta in tuned.attached()[0].attachment.deltas.items():
        values = torch.linalg.svdvals(delta.matrix().double())[:2]
        entry = found[site.name, 0]
        assert entry.rank == 2 and entry.parameters == 2 * (site.d_in + site.d_out)
        assert entry.norm == pytest.approx(float(delta.matrix().norm()), rel=1e-6)
        torch.testing.assert_close(torch.tensor(entry.singular), values, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert all(found[site.name, 1].norm == 0 for site in tuned.attached()[1].attachment.deltas)
    for site, delta in tuned.attached()[2].attachment.deltas.items():
        weight = tuned.model.get_submodule(site.path).base.weight
        assert found[site.name, 2].norm == pytest.approx(float((delta.fold(weight, None)[0] - weight).norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_values_are_read_without_torch(tmp_path, dtype):
    from safetensors.torch import save_file

    tensor = (torch.randn(3, 5) * 3).to(dtype)
    save_file({"a": tensor, "empty": torch.zeros(0, 2), "scalar": torch.tensor(2.5)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    values = read_values(tmp_path / "x.safetensors", header.tensors["a"])
    assert torch.equal(torch.from_numpy(values.copy()).double(), tensor.double())
    assert header.tensors["empty"].shape == (0, 2) and header.tensors["scalar"].elements == 1


def test_facts_need_no_torch(tmp_path):
    native.save(tuned_llama(), tmp_path / "d")
    code = ("import sys; from pathlib import Path; from deltaloom.checkpoint.record import delta_file_facts; "
            f"print(delta_file_facts(Path({str(tmp_path / 'd')!r})).parameters); sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# ---- damage ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "d"
    native.save(tuned_llama(LoRA(rank=1, targets="q_proj")), folder, base=BASE)
    return {name: (folder / name).read_bytes() for name in (RECORD, TENSORS)}


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def assert_refused(folder, match=None):
    model = toy("llama")
    with pytest.raises(DeltaloomError) as caught:
        native.load(model, folder, strict=False)
    assert match is None or re.search(match, str(caught.value)), caught.value
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())


def test_every_truncation_is_found(whole, tmp_path):
    raw = whole[TENSORS]
    for length in [*range(0, 16), *range(16, len(raw), 97), len(raw) - 1]:
        folder = put(tmp_path / "d", whole | {TENSORS: raw[:length]})
        with pytest.raises(CheckpointError, match=r"whole safetensors file|another size"):
            native.read(folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(whole, tmp_path_factory, data):
    raw = bytearray(whole[TENSORS])
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder = put(tmp_path_factory.getbasetemp() / "flipped", whole | {TENSORS: bytes(raw)})
    with pytest.raises(CheckpointError):
        native.read(folder)


def test_messages_name_the_file_and_the_next_step(whole, tmp_path):
    flipped = bytearray(whole[TENSORS])
    flipped[-1] ^= 4
    assert_refused(put(tmp_path / "a", whole | {TENSORS: bytes(flipped)}), "delta.safetensors is not the file.*copy or save it")
    assert_refused(put(tmp_path / "b", {RECORD: whole[RECORD]}), "no delta.safetensors")
    assert_refused(put(tmp_path / "c", {TENSORS: whole[TENSORS]}), "no delta.json")
    assert_refused(tmp_path / "nothing", "no delta.json")
    assert_refused(put(tmp_path / "e", whole | {RECORD: whole[RECORD][:-40]}), "legal JSON")


def edited(whole, change):
    record = json.loads(whole[RECORD])
    change(record)
    return whole | {RECORD: json.dumps(record).encode()}


@pytest.mark.parametrize(("change", "match"), [
    (lambda r: r.update(version=2), "later deltaloom"),
    (lambda r: r.update(version=0), "version 0"),
    (lambda r: r.update(surprise=1), "surprise"),
    (lambda r: r.update(format="other"), "format"),
    (lambda r: r.pop("methods"), "methods"),
    (lambda r: r["methods"].clear(), "methods"),
    (lambda r: r["methods"][0]["settings"].update(method="lorra"), "Did you mean 'lora'"),
    (lambda r: r["methods"][0]["settings"].update(method=3), "method: NAME"),
    (lambda r: r["methods"][0]["settings"].update(method="../base"), "unknown method"),
    (lambda r: r["methods"][0]["settings"].update(method="-ranked"), "unknown method"),
    (lambda r: r["methods"][0]["settings"].update(rnak=3), "rnak"),
    (lambda r: r["methods"][0]["settings"].update(rank=-1), "rank"),
    (lambda r: r["methods"][0]["settings"].update(rank=10 ** 12), "more than the"),
    (lambda r: r["methods"][0]["settings"].update(rank_pattern={"q_proj": 10 ** 12}), "more than the"),
    (lambda r: r["methods"][0]["settings"].update(rank_pattern={"(a+)+": 2}), "repeats a group"),
    (lambda r: r["methods"][0]["settings"].update(rank_pattern={"zzz": 2}), "match no site"),
    (lambda r: r["methods"][0]["sites"].append("model.layers.9.mlp"), "not in this model"),
    (lambda r: r["methods"][0]["sites"].pop(), "unexpected"),
    (lambda r: r["methods"][0]["sites"].append(r["methods"][0]["sites"][0]), "twice"),
    (lambda r: r["methods"][0]["sites"].append("model.layers.0.self_attn.k_proj"), "missing"),
    (lambda r: r["tensors"].update(file="../../etc/passwd"), "file"),
    (lambda r: r["tensors"].update(bytes=3), "another size"),
    (lambda r: r["tensors"].update(sha256="0" * 64), "sha256"),
    (lambda r: r["tensors"].update(same={"a": "b"}), "same tensor"),
])
def test_records_that_are_wrong(whole, tmp_path, change, match):
    assert_refused(put(tmp_path / "d", edited(whole, change)), match)


def test_odd_json(whole, tmp_path):
    for raw in (b"", b"[]", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"version": NaN}', b'{"version": ' + b"9" * 5000 + b"}",
                b"\xff\xfe", b'{"version": 1' + b"}" * 3):
        assert_refused(put(tmp_path / "d", whole | {RECORD: raw}))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=8)


def paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_value_anywhere_in_the_record(whole, tmp_path_factory, data):
    record = json.loads(whole[RECORD])
    path = data.draw(st.sampled_from([path for path in paths(record) if path]))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = data.draw(JSON)
    folder = put(tmp_path_factory.getbasetemp() / "fuzzed", whole | {RECORD: json.dumps(record).encode()})
    try:
        tuned = native.load(toy("llama"), folder, strict=False)
    except DeltaloomError:
        return
    assert isinstance(tuned, Tuned)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_header(tmp_path_factory, data):
    """Only a CheckpointError, or a header whose tensors tile the file."""
    entry = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "I8", "Q4", 3]),
                                   "shape": st.lists(st.integers(-1, 4) | st.just(2 ** 70), max_size=3),
                                   "data_offsets": st.lists(st.integers(-1, 64), max_size=3)})
    header = data.draw(st.dictionaries(st.text(max_size=4), entry | JSON, max_size=3) | JSON)
    raw = json.dumps(header).encode()
    length = data.draw(st.just(len(raw)) | st.integers(0, 2 ** 64 - 1))
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + raw + bytes(data.draw(st.integers(0, 64))))
    try:
        found = read_header(path)
    except CheckpointError:
        return
    for info in found.tensors.values():
        assert read_values(path, info).shape == info.shape
    native.read_tensors(path)


@pytest.mark.parametrize(("places", "size"), [
    ([(0, 4), (0, 4)], 4), ([(0, 4), (8, 12)], 12), ([(0, 4), (2, 6)], 6), ([(4, 8)], 8), ([(0, 4)], 8), ([(0, 4)], 3),
    ([(0, 4), (4, 8)], 8)])
def test_tensors_that_overlap_or_leave_holes(tmp_path, places, size):
    header = {str(i): {"dtype": "F32", "shape": [1], "data_offsets": place} for i, place in enumerate(places)}
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    if places == [(0, 4), (4, 8)]:
        assert len(read_header(path).tensors) == 2
    else:
        with pytest.raises(CheckpointError, match="safetensors"):
            read_header(path)


def test_unknown_facts_of_the_base_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="sauce"):
        native.save(tuned_llama(), tmp_path / "d", base={"sauce": "toy"})
