import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from deltaloom import events
from deltaloom.errors import ResourceError, UsageError
from deltaloom.report.page import write_report

from .folders import classification_run, run_events, run_file, save_record

EVIL = """"'><script>alert(1)</script><img src=x onerror=alert(1)></style></svg>{{ 7*7 }}"""


class Page(HTMLParser):
    """Every start tag with its attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    classification_run(folder / "sst2")
    return write_report([folder / "sst2"], folder / "report.html").read_text()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = [classification_run(folder / "one"), classification_run(folder / "two", rate=1e-2, rank=16, seed=2)]
    return write_report(runs, folder / "report.html").read_text()


def assert_self_contained(html):
    """Nothing to load, nothing to run, one style sheet that the policy allows, no attribute that the policy would refuse."""
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "image",
        "use",
        "form",
        "base",
        "foreignobject",
        "animate",
    }
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    for tag, attributes in page.tags:
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(styles) == 1
    digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_a_page_is_self_contained(html, several):
    assert_self_contained(html)
    assert_self_contained(several)


def test_its_drawings_are_valid_xml_with_labels(html, several):
    for page in (html, several):
        drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        assert len(drawings) >= 8
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)
            assert root.get("role") == "img" and root.get("aria-label")


def test_ids_are_unique_and_links_lead_somewhere(html, several):
    for text in (html, several):
        page = Page(text)
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
        assert len(links) >= 10 and set(links) <= set(ids)


def test_every_element_is_closed(html, several):
    void = {"meta", "br"}
    drawing = {"line", "circle", "rect", "polyline", "path"}
    for text in (html, several):
        plain = re.sub(r"<(\w+)[^>]*/>", "", text)
        for tag in {tag for tag, _ in Page(plain).tags} - void - drawing - {"html"}:
            assert len(re.findall(rf"<{tag}[\s>]", plain)) == plain.count(f"</{tag}>"), tag


def test_every_kind_of_event_leaves_a_trace(html):
    shown = " ".join(Page(html).words)
    traces = {
        events.DataRead: "3,420 training rows, 872 evaluation rows",
        events.Attached: "encoder.layer.0.attention.self.query",
        events.Sampled: "it 's slow -- very , very slow .",
        events.Started: "120 steps planned",
        events.Step: "Gradient norm",
        events.Evaluated: "best at step 120",
        events.Saved: "step-120, 302,112 bytes",
        events.Warned: "12 training rows occur twice",
        events.RankChanged: "Ranks while training",
        events.Routed: "label: mixed <b>",
        events.Acted: "accuracy has not risen for 2 evaluations",
        events.Privacy: "all runs of this folder",
        events.Finished: "completed",
    }
    assert {type(event) for event in run_events()} == set(traces) == set(events.Event.__subclasses__())
    for kind, trace in traces.items():
        assert trace in shown, kind


def test_the_headline_tells_gain_sizes_and_speed(html):
    shown = " ".join(" ".join(Page(html).words).split())
    for part in (
        "0.5092 → 0.8392 +0.3300",
        "302 kB",
        "73,728 parameters, 0.325% of the model's 22,713,986",
        "1m 14s",
        "2,888 tokens/s",
        "413 MB",
        "95% interval 0.8131 to 0.8651",
    ):
        assert part in shown, part


def test_hostile_content_stays_text(tmp_path):
    folder = classification_run(tmp_path / "run")
    sink = events.JsonLines(folder / "events.jsonl")
    for event in (
        events.Sampled(row=1, input=EVIL, reference=EVIL, before=EVIL, after=EVIL),
        events.Warned(kind=EVIL, message=EVIL),
        events.Acted(step=1, action=EVIL, reason=EVIL),
        events.RankChanged(step=1, rows=EVIL, ranks={EVIL: [3]}, importance={EVIL: [0.5]}, parameters=1, budget=1, residual=0.1),
        events.Evaluated(step=9, metrics={EVIL: 0.5}),
        events.Finished(step=9, reason=EVIL, seconds=1, tokens=1),
        events.Attached(
            table=[{"method": EVIL, "target": EVIL, "examples": EVIL}], delta_parameters=1, head_parameters=1, total_parameters=1
        ),
        events.DataRead(
            facts={
                "format": EVIL,
                "labels": {EVIL: 1},
                "lengths": {EVIL: EVIL},
                EVIL: EVIL,
                "first_rows": [EVIL, {"where": EVIL, "segments": [{"text": EVIL, "learned": True}], "target": EVIL}],
            }
        ),
    ):
        sink(event)
    sink.close()
    result = json.loads((folder / "metrics.json").read_text())
    result |= {
        "model": EVIL,
        "task": EVIL,
        "methods": [{"method": EVIL}],
        "metrics": {EVIL: 0.5},
        "primary": {"name": EVIL},
        "per_class": [{"label": EVIL, "f1": 0.5}],
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    (folder / "run.yaml").write_text(json.dumps(run_file(1e-3, 8, EVIL) | {EVIL: EVIL, "origins": {EVIL: EVIL}}))
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    group = {"role": EVIL, "shape": [EVIL, 2], "method": 0, "layers": 2, "rho": 0.5, "ranks": [1, EVIL]}
    save_record(folder, methods=[{"settings": {"method": EVIL}}], groups=[group])
    other = classification_run(tmp_path / "<script>alert(1)<" / "x<b>y")
    for runs in ([folder], [folder, other]):
        html = write_report(runs, tmp_path / "report.html").read_text()
        assert_self_contained(html)
        assert "&lt;script&gt;" in html and "{{ 7*7 }}" in html and "<b>y" not in html


def test_several_runs_show_what_differs_and_each_run(several):
    page = Page(several)
    shown = " ".join(page.words)
    assert "deltas.0.rank" in shown and "train.learning_rate" in shown
    marked = re.findall(r'<tr class="differs"><th class="mono">([^<]*)</th>', several)
    assert marked == ["deltas.0.rank", "train.learning_rate"]
    best = re.findall(r'<td class="[^"]*\bbest">([^<]*)</td>', several)
    assert best[0] == "0.5092 → 0.8392 (+0.3300)"
    assert sum(tag == "details" and attributes.get("class") == "run" for tag, attributes in page.tags) == 2
    overlaid = re.findall(r"<svg.*?</svg>", several, re.DOTALL)[0]
    assert ">one<" in overlaid and ">two<" in overlaid


def test_an_empty_and_a_cut_run_get_a_page_that_says_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    cut = classification_run(tmp_path / "cut", steps=20, finished=False)
    for runs, note in (
        ([tmp_path / "empty"], "events.jsonl is missing"),
        ([cut], "metrics.json is missing"),
        ([tmp_path / "empty", cut], "cut: metrics.json is missing"),
    ):
        html = write_report(runs, tmp_path / "report.html").read_text()
        assert note in html
        assert_self_contained(html)


def test_a_page_is_small(html, several):
    assert len(html) < 300_000 and len(several) < 700_000


def test_writing_is_atomic_and_refusals_leave_the_old_page(tmp_path):
    run = classification_run(tmp_path / "run", steps=5)
    output = tmp_path / "new" / "report.html"
    assert write_report([run], output) == output
    before = output.read_bytes()
    with pytest.raises(UsageError, match="at least one"):
        write_report([], output)
    with pytest.raises(UsageError, match="no run folder"):
        write_report([run, tmp_path / "nowhere"], output)
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    with pytest.raises(ResourceError, match="could not be written"):
        write_report([run], run)
    with pytest.raises(ResourceError, match="could not be written"):
        write_report([run], run / "run.yaml" / "report.html")


def test_first_rows_mark_what_is_learned(html):
    assert 'Review: dull\nVerdict: <mark title="learned">negative&lt;eos&gt;</mark>' in html
    assert "target: <mark>positive (class 1)</mark>" in html
    assert "A" * 50 not in html  # the set of token ids is for programs
