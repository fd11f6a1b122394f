"""The report page in a real Chromium, driven over its debugging pipe."""

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.test_report import Build, evil, losses, sample, scored, small

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (390, 1280)
PAPER = 718
"""CSS pixels between the margins of A4."""
SECONDS = 60

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="NOT TESTED: no Chromium here, so the report page was never opened; "
    "install `chromium` or `google-chrome`",
)


class Tab:
    """One page in a headless Chromium of its own, and all that it complained of."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()
        self.process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'),
                *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
                *("--no-first-run", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync"),
                *("--disable-dev-shm-usage", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers = itertools.count(1)
        self.events: list[dict] = []
        self.rest = b""
        self.session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        try:
            self.session = ""
            self.call("Browser.close")
            self.process.wait(timeout=SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.ours_in)
            os.close(self.ours_out)

    def receive(self, until: float) -> dict:
        while b"\0" not in self.rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.ours_in], [], [], left)[0]:
                raise TimeoutError(f"Chromium did not answer in {SECONDS} s")
            chunk = os.read(self.ours_in, 1 << 16)
            if not chunk:
                raise EOFError("Chromium ended")
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while (answer := self.receive(until)).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        self.size(width)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=media)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        until = time.monotonic() + SECONDS
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.receive(until))
        frames = "new Promise(r => requestAnimationFrame(() => setTimeout(r, 200)))"
        self.ask(frames)

    def size(self, width: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1},
            mobile=width < 600,
        )

    def ask(self, expression: str):
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def complaints(self) -> list[dict]:
        """Errors, warnings and refusals by the page's policy."""
        return [
            event["params"]
            for event in self.events
            if event["method"] in {"Runtime.exceptionThrown", "Log.entryAdded"}
            or (
                event["method"] == "Runtime.consoleAPICalled"
                and event["params"]["type"] in {"error", "warning", "assert"}
            )
        ]

    @property
    def requests(self) -> list[str]:
        """What the page asked for, itself and data: addresses apart."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
            and event["params"].get("type") != "Document"
        ]
        return [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    tab = Tab(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture
def page(tmp_path) -> Path:
    small(tmp_path).page()
    return tmp_path / "page" / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_is_drawn_and_nothing_is_asked_or_complained_of(
    tab, page, width, scheme
):
    tab.open(page, width, scheme)
    assert tab.complaints == []
    assert tab.requests == []
    drawn = "[...document.querySelectorAll('.plot')].map(p => "
    drawn += "p.querySelectorAll('.main-svg .trace').length)"
    assert tab.ask(drawn) == [1, 1, 1, 1]
    assert tab.ask("innerWidth") == width
    assert tab.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_a_wide_graph_scrolls_in_its_box_and_not_the_page(tab, tmp_path, width):
    build = small(tmp_path)
    parent = "grpo/reasoner"
    for at in range(25):
        build.node(f"sft/a_long_name_{at}", [parent], metrics_jsonl=losses(2))
        parent = f"sft/a_long_name_{at}"
    build.page()
    tab.open(tmp_path / "page" / "report.html", width)
    assert tab.complaints == []
    assert tab.ask("document.documentElement.scrollWidth") <= width
    box = "document.querySelector('.lineage')"
    assert tab.ask(f"{box}.scrollWidth > {box}.clientWidth")


def several(tmp_path) -> Build:
    """Several nodes of a stage, a sweep of a dozen, long names and settings."""
    build = small(tmp_path)
    rows = [row | {"token_accuracy": 0.5} for row in losses(5)]
    build.node("sft/other", ["pretrain/base"], metrics_jsonl=rows, recipe={"lr": 1e-5})
    for at in range(12):
        id = f"grpo/reasoner_with_a_long_name_{at}"
        recipe = {f"overrides.a_long_key.number_{k}": at % 3 for k in range(9)}
        build.node(id, ["sft/other"], metrics_jsonl=losses(3, "reward"), recipe=recipe)
        found = scored(**{id.replace("/", "__"): 10 * at})
        answer = [sample(id, given="a prompt " * 9, answer="anewlongword" * 20)]
        build.node(
            f"eval/of_{at}",
            [id],
            scores__scores_json=found,
            scores__samples_jsonl=answer,
        )
    return build


WIDER = """[...document.querySelectorAll('body *')].filter((e) =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  && !e.closest('.scroll')).map((e) => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", WIDTHS)
def test_nodes_are_compared_within_the_page(tab, tmp_path, width):
    several(tmp_path).page()
    tab.open(tmp_path / "page" / "report.html", width)
    assert tab.complaints == []
    names = "[...document.querySelectorAll('.legendtext')].map(t => t.textContent)"
    assert {"sft/instruct", "sft/other"} <= set(tab.ask(names))
    lines = "[...document.querySelectorAll('.plot')].map(p => "
    lines += "p.querySelectorAll('.scatterlayer .trace').length)"
    assert {2, 13} <= set(tab.ask(lines))
    assert tab.ask(WIDER) == []
    assert tab.ask("document.documentElement.scrollWidth") <= width
    cell = "getComputedStyle(document.querySelector('.samples td')).display"
    assert tab.ask(cell) == ("grid" if width < 600 else "table-cell")


def test_on_paper_nothing_is_cut_off(tab, tmp_path):
    several(tmp_path).page()
    tab.open(tmp_path / "page" / "report.html", 1280, "dark")
    tab.call("Emulation.setEmulatedMedia", media="print")
    tab.size(PAPER)
    hidden = "[...document.querySelectorAll('.scroll')].filter(e => "
    hidden += "getComputedStyle(e).overflowY !== 'visible').length"
    assert tab.ask(hidden) == 0
    assert tab.ask("document.documentElement.scrollWidth") <= PAPER
    assert tab.ask("getComputedStyle(document.body).color") == "rgb(24, 33, 43)"


@pytest.mark.parametrize("width", WIDTHS)
def test_strangers_markup_is_shown_and_never_run(tab, tmp_path, width):
    evil(tmp_path).page()
    tab.open(tmp_path / "page" / "report.html", width)
    assert tab.complaints == []
    assert tab.requests == []
    assert tab.ask("document.querySelectorAll('script, img').length") == 3
    for shown in ("h1", "title", ".prompt", ".answer", ".settings dt"):
        text = tab.ask(f"document.querySelector('{shown}').textContent")
        assert "<img src" in text and "hack()>" in text, shown
    label = "document.querySelector('.ytick text').textContent"
    assert tab.ask(label).startswith("sft/<b>b</b>")
    assert tab.ask("document.documentElement.scrollWidth") <= width


def test_a_box_of_the_drawing_leads_to_its_node(tab, page):
    tab.open(page, 1280)
    link = "document.querySelector('#lineage a[aria-label^=\"sft/instruct\"]')"
    tab.ask(f"{link}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    assert tab.ask("document.querySelector(':target h3').textContent") == "sft/instruct"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(tab, page, scheme):
    """At least 4.5 to 1, the WCAG's AA, for all text of the page and its plots."""
    tab.open(page, 1280, scheme)
    assert tab.ask(CONTRAST) == []


def test_the_page_is_whole_without_a_plot(tab, tmp_path):
    build = small(tmp_path)
    build.flags.clear()
    build.page()
    tab.open(tmp_path / "page" / "report.html", 390)
    assert tab.complaints == []
    assert tab.ask("document.querySelectorAll('.none').length") == 5


@pytest.mark.parametrize(
    "trouble",
    [
        "<img src='http://127.0.0.1:9/x'>",
        "<script>nothing()</script>",
        "<script>console.error('x')</script>",
    ],
)
def test_this_test_would_see_trouble(tab, tmp_path, trouble):
    (tmp_path / "bad.html").write_text(trouble)
    tab.open(tmp_path / "bad.html", 1280)
    assert tab.complaints or tab.requests


def test_the_policy_stops_a_script_that_slipped_in(tab, page):
    slipped = (
        "<script>window.hacked = 1</script><img src=x onerror='hacked = 1'></main>"
    )
    page.write_text(page.read_text().replace("</main>", slipped))
    tab.open(page, 1280)
    assert tab.ask("window.hacked === undefined")
    assert any("Content Security Policy" in json.dumps(c) for c in tab.complaints)


CONTRAST = """
(() => {
  const rgba = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map(
      (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const box = element.closest('.ln-node');
    if (box) return rgba(getComputedStyle(box.querySelector('.ln-box path')).fill);
    for (let e = element; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('body *:not(script):not(style)')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length || e.closest('noscript')) continue;
    const style = getComputedStyle(e);
    const text = rgba(e instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(text), light(behind(e).slice(0, 3))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([e.textContent.trim().slice(0, 30), ratio]);
  }
  return bad;
})()
"""
