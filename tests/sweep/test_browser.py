"""Tests of the report in a browser: its script, and its layout on a phone."""

import json
import re
import shutil
import subprocess

import pytest
from support.small_sweep import SAMPLE

from qpaged.sweep import write_report
from qpaged.sweep.results import closest_first

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytest.importorskip("jinja2", reason="jinja2 comes with qpaged[sweep]")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--allow-file-access-from-files", "--enable-logging=stderr",
    "--virtual-time-budget=5000", "--dump-dom",
)  # fmt: skip

USER = """<!doctype html><meta charset="utf-8">
<iframe id="desk" src="report.html" style="width: 1440px; height: 900px"></iframe>
<iframe id="phone" src="report.html" style="width: 390px; height: 800px"></iframe>
<pre></pre>
<script>
function use(name) {
  const frame = document.getElementById(name);
  const [page, root] = [frame.contentDocument, frame.contentDocument.documentElement];
  const one = (selector) => page.querySelector(selector);
  const shown = (elements) => [...elements].filter((element) => element.getClientRects().length);
  const text = (element) => element.textContent.replace(/\\s+/g, " ").trim();
  const observed = { verdict: text(one("#verdict")), overflow: root.scrollWidth - root.clientWidth };

  const [chart] = shown(page.querySelectorAll("#frontier svg"));
  const dot = chart.querySelector(".dot[aria-label='int8']");
  const box = dot.lastElementChild.getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true, detail: 1 };
  chart.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
  observed.hovered = text(one(".card"));
  chart.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave", at));
  observed.left = shown([one(".card")]).length;
  dot.dispatchEvent(new frame.contentWindow.MouseEvent("click", at));
  observed.tapped = text(one(".card"));
  dot.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  observed.next = page.activeElement.getAttribute("aria-label");

  const first = () => text(one("#formats tbody th"));
  const sort = (i) => page.querySelectorAll("#formats thead button")[i].click();
  observed.first = [first()];
  for (const column of [1, 1, 4, 0]) { sort(column); observed.first.push(first()); }

  one("#layers input[value='attention-kl']").click();
  observed.panels = shown(page.querySelectorAll(".panel")).map((panel) => panel.dataset.map);
  const curves = () => shown(page.querySelectorAll(".curve")).map((curve) => Number(curve.dataset.choice));
  observed.curves = [curves()];
  one(".choices input[value='2']").click();
  observed.curves.push(curves());
  return observed;
}
onload = () => {
  document.querySelector("pre").textContent = JSON.stringify({ desk: use("desk"), phone: use("phone") });
};
</script>
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Return what the script above observed at a desktop's and at a phone's width, and the browser's log."""
    directory = tmp_path_factory.mktemp("browser")
    write_report(json.loads(SAMPLE.read_text()), directory)
    (directory / "user.html").write_text(USER, encoding="utf-8")
    profile, page = f"--user-data-dir={directory / 'profile'}", f"file://{directory / 'user.html'}"
    done = subprocess.run([BROWSER, *FLAGS, profile, page], capture_output=True, text=True, timeout=60)
    written = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL).group(1)
    assert written, done.stderr
    return json.loads(written.replace("&lt;", "<").replace("&amp;", "&")), done.stderr


@pytest.fixture(params=["desk", "phone"])
def observed(session, request):
    return session[0][request.param]


def test_it_logs_no_error(session):
    assert "CONSOLE" not in session[1]


def test_it_fits_without_sideways_scroll(observed):
    assert observed["overflow"] == 0


def test_the_verdict_is_on_top(observed):
    assert "int8 halves the cache for a mean KL of 9.3e-5 ± 0.5e-5 nats a token" in observed["verdict"]


def test_a_dot_shows_its_numbers_when_pointed_at_or_tapped(observed):
    for card in (observed["hovered"], observed["tapped"]):
        assert card.startswith("int8bytes per token1,025")
        assert "KL mean9.3e-5 ± 0.5e-5" in card
    assert observed["left"] == 0


def test_arrows_go_to_the_next_dot(observed, sample):
    ascending = sorted(sample["runs"], key=lambda run: run["bytes_per_token"])
    names = [run["format"] for run in ascending if run["bytes_per_token"] >= 1025]
    assert observed["next"] in names
    assert observed["next"] != "int8"


def test_headings_sort(observed, sample):
    by_bytes = sorted(sample["runs"], key=lambda run: run["bytes_per_token"])
    by_kl = closest_first(sample["runs"])
    by_name = sorted(run["format"] for run in sample["runs"])
    first = [name.replace("●", "").strip() for name in observed["first"]]
    assert first == [
        by_kl[0]["format"], by_bytes[0]["format"], by_bytes[-1]["format"], by_kl[0]["format"], by_name[0],
    ]  # fmt: skip


def test_one_map_of_the_layers_is_shown(observed):
    assert observed["panels"] == ["attention-kl"]


def test_a_curve_is_added(observed):
    before, after = observed["curves"]
    assert sorted({2, *before}) == after
    assert 2 not in before
