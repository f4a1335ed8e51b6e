import dataclasses
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaloom import events
from deltaloom.errors import UsageError
from deltaloom.report.card import model_card
from deltaloom.report.compare import compare
from deltaloom.report.facts import read_run
from deltaloom.report.page import render

from .folders import STEPS, classification_run, metrics, run_events

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from([10**400, -1, "\ud800", "\x00\x1b[2J", "</style><script>", 1e308, -1e308, 5e-324]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
EVENT_FIELDS = {kind.__name__: [field.name for field in dataclasses.fields(kind)] for kind in events.Event.__subclasses__()}
METRIC_KEYS = sorted(metrics())


@st.composite
def event_records(draw):
    kind = draw(st.sampled_from([*EVENT_FIELDS, "Unheard"]))
    return {"event": kind, **{field: draw(json_values) for field in EVENT_FIELDS.get(kind, ["x"])}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return classification_run(tmp_path_factory.mktemp("facts") / "sst2")


def written(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, content in {
        "events": "events.jsonl",
        "metrics": "metrics.json",
        "run": "run.yaml",
        "environment": "environment.json",
    }.items():
        if name in texts:
            (folder / content).write_bytes(
                texts[name] if isinstance(texts[name], bytes) else texts[name].encode("utf-8", "backslashreplace")
            )
    return folder


def assert_shown(folder):
    """Whatever the folder holds: facts, page, card and comparison come out."""
    facts = read_run(folder)
    page = render([facts], ["one"])
    page.encode("utf-8")
    model_card(facts).encode("utf-8")
    compare([facts, facts], ["a", "b"]).text()
    assert "<script" not in page
    return facts


def test_a_whole_run_is_read(run):
    facts = read_run(run)
    assert facts.missing == ()
    assert (facts.name, facts.task, facts.model, facts.methods, facts.status) == (
        "sst2",
        "sequence-classification",
        "bundled:minilm",
        ("lora",),
        "completed",
    )
    assert facts.primary.name == "accuracy"
    assert facts.primary.gain == pytest.approx(0.33) and facts.primary.better is True
    assert (facts.primary.low, facts.primary.high, facts.primary.majority) == (0.8131, 0.8651, 0.5092)
    loss = next(metric for metric in facts.metrics if metric.name == "loss")
    assert loss.gain < 0 and loss.better is True
    assert len(facts.curves["loss"]) == STEPS and "penalty" not in facts.curves
    assert facts.sizes.trainable_share == pytest.approx(73728 / 22713986)
    assert facts.best_step == STEPS
    assert facts.data.labels == (("positive", 1804, 444), ("negative", 1616, 428))
    assert facts.data.label_order == ("negative", "positive")
    assert dict(facts.data.lengths)["mean"] == "26.72"
    assert facts.data.first_rows[1].segments == (("Review: dull\nVerdict: ", False), ("negative<eos>", True))
    assert dict(facts.data.others)["vocabulary"] == "8123"
    assert dict(facts.data.others)["overlap"] == "1"
    assert [(warning.kind, warning.count) for warning in facts.warnings] == [("duplicate", 12), ("truncated", 3), ("warning", 1)]
    assert [group.name for group in facts.ranks[0].groups] == ["q", "k", "v", "o", "up", "down"]
    assert facts.ranks[0].rows == "layer" and facts.ranks[0].steps == (20, 40, 60, 80, 100, 120)
    assert [(row.method, row.role, row.layers) for row in facts.depth[:2]] == [("lora", "q", 6), ("lora", "k", 6)]
    assert facts.warnings[2].messages == ("1 of 872 evaluation rows has the input of a training row",)
    origins = {setting.key: setting.origin for setting in facts.settings}
    assert (origins["train.learning_rate"], origins["deltas.0.rank"], origins["data.max_length"]) == ("flag", "file", "default")
    assert facts.setting("data.train") == "train.jsonl"
    assert not any(setting.key.startswith("origins") for setting in facts.settings)


def test_speed_is_tokens_over_seconds(run):
    steps = [event for event in run_events() if isinstance(event, events.Step)]
    assert read_run(run).curves["tokens_per_second"] == tuple((float(s.step), s.tokens / s.seconds) for s in steps)


def test_secrets_are_hidden(run):
    assert dict(read_run(run).environment)["hf_token"] == "(hidden)"


@pytest.mark.parametrize(
    ("key", "value", "hidden"),
    [
        ("env.HF_TOKEN", "abc", True),
        ("db.password", "x", True),
        ("note", "hf_" + "a" * 30, True),
        ("proxy", "https://me:pw@host/x", True),
        ("train.batch_tokens", "4096", False),
        ("tokens", "12", False),
        ("model", "org/name", False),
        ("url", "https://host:80/x", False),
    ],
)
def test_what_counts_as_a_secret(tmp_path, key, value, hidden):
    folder = written(tmp_path / "run", environment=json.dumps({key: value}))
    assert dict(read_run(folder).environment)[key] == ("(hidden)" if hidden else value)


def test_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        read_run(tmp_path / "nowhere")


def test_an_empty_folder_says_what_is_missing(tmp_path):
    facts = assert_shown(written(tmp_path / "run"))
    assert sorted(facts.missing) == [
        "environment.json is missing",
        "events.jsonl is missing",
        "metrics.json is missing",
        "run.yaml is missing",
    ]


def test_an_interrupted_run_says_so_and_sums_its_steps(tmp_path):
    facts = read_run(classification_run(tmp_path / "cut", steps=30, finished=False))
    assert facts.status == "unfinished"
    assert facts.missing == ("metrics.json is missing", "the run has no end: it was interrupted or still goes on")
    steps = [event for event in run_events(steps=30) if isinstance(event, events.Step)]
    assert facts.sizes.tokens == sum(step.tokens for step in steps)
    assert facts.sizes.seconds == pytest.approx(sum(step.seconds for step in steps))


def test_a_resumed_run_counts_the_later_record_of_a_step(tmp_path):
    def step(number, loss):
        return json.dumps({"event": "Step", "step": number, "loss": loss})

    folder = written(
        tmp_path / "run",
        events="\n".join(
            (
                json.dumps({"event": "Started", "step": 0, "total_steps": 3}),
                step(1, 5.0),
                step(2, 4.0),
                step(3, 3.0),
                json.dumps({"event": "Started", "step": 1, "total_steps": 3}),
                step(2, 2.0),
            )
        ),
    )
    facts = read_run(folder)
    assert facts.curves["loss"] == ((1.0, 5.0), (2.0, 2.0), (3.0, 3.0))
    assert [moment.what for moment in facts.timeline] == ["started", "resumed"]


def test_cut_lines_unknown_kinds_and_infinite_losses_are_noted(tmp_path):
    folder = written(
        tmp_path / "run", events=b'{"event": "Step", "step": 1, "loss": null}\n{"event": "Round"}\n{"event": "Step", "st\xc3'
    )
    notes = read_run(folder).missing
    assert "events.jsonl: 1 of 3 lines are cut or are no events and were left out" in notes
    assert "1 events of the kind Round are not shown here" in notes
    assert "1 of 1 steps have no finite loss" in notes


def test_texts_with_strange_line_ends_and_surrogates_survive(tmp_path):
    sink = events.JsonLines(tmp_path / "run" / "events.jsonl")
    sink(events.Sampled(row=1, input="a\u2028b\x85c", reference="\ud800", before="", after="x"))
    sink.close()
    facts = assert_shown(tmp_path / "run")
    assert facts.samples[0].input == "a\ufffdb\ufffdc" and facts.samples[0].reference == "\ufffd"


def test_yaml_cannot_construct_or_explode(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    facts = assert_shown(written(tmp_path / "bomb", run=bomb))
    assert len(facts.settings) == 1000 and "only the first 1,000 settings are shown" in facts.missing
    facts = assert_shown(written(tmp_path / "tag", run="model: !!python/object/apply:os.getcwd []\nwhen: 2001-99-99\n"))
    assert facts.setting("when") == "2001-99-99"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b"1" * 5000, b'{"a": NaN}', b"- - :\n\t", b"\x00"]
)
def test_damaged_files_are_noted(tmp_path, content):
    facts = assert_shown(written(tmp_path / "run", events=content, metrics=content, run=content, environment=content))
    assert isinstance(facts.missing, tuple)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    records=st.lists(event_records() | json_values, max_size=6),
    result=st.dictionaries(st.sampled_from(METRIC_KEYS), json_values, max_size=8) | json_values,
    run=st.dictionaries(st.sampled_from(["model", "task", "deltas", "data", "origins"]), json_values, max_size=4) | json_values,
    environment=json_values,
)
def test_arbitrary_json_is_shown(tmp_path_factory, records, result, run, environment):
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        run_text = yaml.safe_dump(run)
    except (yaml.YAMLError, ValueError):  # what YAML cannot write is given as JSON, which is YAML too
        run_text = json.dumps(run)
    assert_shown(
        written(
            folder,
            events="\n".join(json.dumps(record) for record in records),
            metrics=json.dumps(result),
            run=run_text,
            environment=json.dumps(environment),
        )
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_arbitrary_bytes_are_shown(tmp_path_factory, one, other):
    assert_shown(written(tmp_path_factory.mktemp("bytes"), events=one, metrics=other, run=one, environment=other))


def test_it_is_bounded_however_much_the_run_wrote(tmp_path):
    lines = [json.dumps({"event": "Step", "step": i, "loss": 1.0 / (i + 1), "tokens": 10, "seconds": 0.1}) for i in range(20_000)]
    groups = [f"group {j}" for j in range(50)]
    lines += [json.dumps({"event": "Sampled", "row": i, "input": "x" * 50_000}) for i in range(60)]
    lines += [
        json.dumps({"event": "RankChanged", "step": i, "ranks": {name: [(i + k) % 7 for k in range(300)] for name in groups}})
        for i in range(100)
    ]
    lines += [json.dumps({"event": "Warned", "kind": f"kind {i}", "message": "m"}) for i in range(1000)]
    folder = written(tmp_path / "run", events="\n".join(lines), run="".join(f"k{i}: v\n" for i in range(5000)))
    facts = read_run(folder)
    page = render([facts], ["big"])
    assert len(page) < 3_000_000
    assert any("samples are shown" in note for note in facts.missing) and any(
        "warnings are shown" in note for note in facts.missing
    )
    assert "only the ranks of the first 40 of 50 groups are shown" in facts.missing
    assert any("the first 256 of 300 rows of the ranks" in note for note in facts.missing)


def test_the_origin_of_a_list_is_that_of_its_items(tmp_path):
    origins = {"deltas.0.targets.0": "file", "deltas.0.rank": "flag"}
    content = yaml.safe_dump({"deltas": [{"targets": ["q", "v"], "rank": 4, "alpha": 8}], "origins": origins})
    found = {setting.key: setting.origin for setting in read_run(written(tmp_path / "run", run=content)).settings}
    assert found == {"deltas.0.targets": "file", "deltas.0.rank": "flag", "deltas.0.alpha": ""}
