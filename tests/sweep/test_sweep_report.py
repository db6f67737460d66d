"""Tests of report.html and the figures, as functions of results.json."""

import copy
import re
import sys
from html.parser import HTMLParser

import pytest

from qpaged.sweep import METRICS, MissingExtraError, write_figures, write_report
from qpaged.sweep.report._labels import Box, box_around, place_names
from qpaged.sweep.report.page._distribution import SIZES
from qpaged.sweep.results import closest_first, pareto_front

pytest.importorskip("jinja2", reason="jinja2 comes with qpaged[sweep]")

VOID = {"meta", "input", "br", "wbr", "path", "circle"}
BLOCKS = {"dd", "dt", "p", "td", "th"}


class Page(HTMLParser):
    """The text of every element, by its path of tags, and the tags that were left open."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.seen, self.attributes = [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag
            self.seen.append(("", " " if tag in BLOCKS else ""))

    def handle_data(self, data):
        self.seen.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        shown = "".join(data for tag, data in self.seen if tag not in ("script", "style"))
        return " ".join(shown.replace("\N{NO-BREAK SPACE}", " ").split())

    def of(self, tag, **attributes):
        """Return the attributes of each element of a tag that has these."""
        elements = [element for name, element in self.attributes if name == tag]
        return [element for element in elements if attributes.items() <= element.items()]


@pytest.fixture
def report(tmp_path):
    def write(results):
        return Page(write_report(results, tmp_path))

    return write


def test_the_page_has_its_parts_in_their_order_and_closes_its_tags(sample, report):
    page = report(sample)
    assert page.open == []
    parts = [found["id"] for found in page.of("section")]
    assert parts == ["verdict", "frontier", "formats", "layers", "distribution", "tune", "method"]
    assert "int8:channel+offset+rotate makes the cache 1.8 times smaller" in page.text
    assert "mxfp4:token failed: ValueError: granularity must be one of" in page.text
    assert sample["model"]["sha256"] in page.text


def test_the_page_needs_nothing_else(sample, report):
    page = report(sample)
    assert not re.search(r"https?:|@import|url\(|\bfetch\b", page.source)
    assert not [found for _, found in page.attributes if "src" in found or found.get("href", "#")[0] != "#"]


def test_every_number_is_in_the_table(sample, report):
    page = report(sample)
    numbers = [found["data-v"] for found in page.of("td") if "data-v" in found]
    runs = closest_first(sample["runs"])
    columns = len(numbers) // len(runs)
    assert numbers[::columns] == [f"{run['bytes_per_token']:.6g}" for run in runs]
    assert numbers[3::columns] == [f"{run['kl_mean']:.6g}" for run in runs]
    assert "9.3e-5 ± 0.5e-5" in page.text


def test_every_format_has_a_dot_at_both_sizes_and_the_front_is_marked(sample, report):
    page = report(sample)
    dots = [found for found in page.of("a") if "data-row" in found]
    assert len(dots) == 2 * len(sample["runs"])
    filled = [found["aria-label"] for found in dots if "front" in found["class"].split()]
    assert sorted(filled) == sorted(2 * [run["format"] for run in pareto_front(sample["runs"])])
    assert len(page.of("tr", **{"class": "front"})) == len(filled) // 2


def test_names_and_errors_are_escaped(sample, report):
    evil = "<script>alert(1)</script>\"'&"
    sample["runs"][2]["format"] = sample["model"]["name"] = sample["text"]["source"] = evil
    sample["failures"] = [{"format": evil, "error": evil}]
    sample["settings"]["seed"] = sample["environment"]["device"] = sample["reference"] = evil
    sample["tune"] |= {"verdict": evil, "candidates": [evil] * 3, "layers": [[evil, evil]] * 4}
    page = report(sample)
    assert page.open == []
    assert len(page.of("script")) == 1
    assert page.text.count("<script>") >= 10


def test_the_choice_by_layer_joins_consecutive_layers(sample, report):
    sample["tune"]["layers"] = [["int8", "int4"], ["int8", "int2"], ["int2", "int4"], ["int8", "int4"]]
    text = report(sample).text
    assert "keys int8 layers 0\N{EN DASH}1, 3 keys int2 layer 2" in text
    assert "values int4 layers 0, 2\N{EN DASH}3 values int2 layer 1" in text


def test_layers_have_a_map_for_each_metric_that_is_there(sample, report):
    for run in sample["runs"]:
        run["attention_kl_by_layer"] = run["attention_kl_by_layer_se"] = []
    maps = [found["data-map"] for found in report(sample).of("div") if "data-map" in found]
    assert maps == [
        "attention-error", "attention-error-keys", "attention-error-values",
        "sensitivity-keys", "sensitivity-values",
    ]  # fmt: skip


def test_a_model_whose_layers_cannot_be_inspected(sample, report):
    for run in sample["runs"]:
        run |= {name: [] for name in run if "_by_layer" in name}
        run["attention_error"] = None
    assert "cannot be seen into" in report(sample).text


def test_without_tune_error_bars_or_prompts(sample, report):
    del sample["tune"]
    sample["complete"] = False
    for run in sample["runs"]:
        run |= {name: None for name in run if name.endswith("_se") or name.startswith("greedy")}
    page = report(sample)
    assert "tune" not in [found["id"] for found in page.of("section")]
    assert "The sweep was stopped" in page.text


def test_the_reference_alone(sample, report):
    sample["runs"], sample["tune"] = sample["runs"][:1], None
    page = report(sample)
    assert "No format smaller than bfloat16 was measured" in page.text
    assert "there is no distribution to show" in page.text


def test_curves_of_the_distribution_fall_from_all_tokens_to_the_worst(sample, report):
    curves = re.findall(r'data-choice="\d+"><path d="M([^"]+)"', report(sample).source)
    assert len(curves) == 2 * (len(pareto_front(sample["runs"])) - 1)
    for curve in curves:
        points = [tuple(map(float, point.split())) for point in curve.split("L")]
        xs, ys = zip(*points, strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys)
        assert ys[0] <= SIZES[0].top + 2  # 98 % of the tokens or more, on a logarithmic axis
        assert ys[-1] in [size.y_end for size in SIZES]


def test_the_page_of_a_large_sweep_is_small(sample, report):
    runs = [copy.deepcopy(sample["runs"][i % 17]) for i in range(63)]
    for i, run in enumerate(runs):
        run["format"] += f"{i}" if i else ""
        run |= {name: (value * 2)[:6] for name, value in run.items() if "_by_layer" in name}
    assert len(report(sample | {"runs": runs, "tune": None}).source) < 300_000


def test_results_of_another_version_are_refused(sample, tmp_path):
    for run in sample["runs"]:
        del run["kl_histogram"]
    expected = r"version 2 with all its fields, but came as version 1 without runs.kl_histogram; sweep again"
    for write in (write_report, write_figures):
        with pytest.raises(ValueError, match=expected if write is write_report else "came as version 1;"):
            write(sample | {"version": 1}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_metric_that_older_results_lack_is_unknown(sample, report):
    for run in sample["runs"]:
        del run["perplexity_ratio"], run["greedy_same"]
    page = report(sample)
    columns = [metric.key for metric in METRICS if metric.label]
    numbers = [found["data-v"] for found in page.of("td") if "data-v" in found]
    assert numbers[columns.index("perplexity_ratio") :: len(columns)] == [""] * len(sample["runs"])


def test_results_without_a_run_are_refused(sample, tmp_path):
    with pytest.raises(ValueError, match=r"results.runs must hold the reference at least, but is empty"):
        write_report(sample | {"runs": []}, tmp_path)


def test_a_missing_package_is_named(sample, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"jinja2 is needed here: pip install"):
        write_report(sample, tmp_path)


def test_figures_are_pngs_and_svgs_with_text_as_text(sample, tmp_path):
    sample["runs"] = [sample["runs"][i] for i in (0, 2, 9)]
    sample["runs"][1]["format"] = "$int<8$"  # neither mathematics nor markup
    paths = write_figures(sample, tmp_path)
    assert [path.name for path in paths] == ["frontier.png", "frontier.svg", "layers.png", "layers.svg"]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ">$int&lt;8$</text>" in path.read_text(encoding="utf-8")


def test_figures_without_layers(sample, tmp_path):
    for run in sample["runs"]:
        run["attention_error_by_layer"] = []
    assert [path.stem for path in write_figures(sample, tmp_path)] == ["frontier", "frontier"]


FRAME = Box(0, 0, 400, 300)


def test_names_touch_neither_each_other_nor_dots():
    dots = [(200.0, 100.0, 80.0, True), (205.0, 104.0, 80.0, True), (210.0, 96.0, 80.0, False)]
    obstacles = [box_around(x, y, 5) for x, y, _, _ in dots]
    places = place_names(dots, obstacles, FRAME, 12)
    assert None not in places
    taken = [*places, *obstacles]
    assert not any(a.touches(b) for i, a in enumerate(taken) for b in taken[:i] if a in places or b in places)


def test_a_name_without_room_is_left_out():
    assert place_names([(200, 100, 80, True)], [Box(0, 0, 400, 300)], FRAME, 12) == [None]
    assert place_names([(200, 100, 500, True)], [], FRAME, 12) == [None]
