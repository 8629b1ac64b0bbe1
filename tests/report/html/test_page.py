"""The page of a report: what it holds, what it escapes, and what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.report import Outcome, html_report, write_report
from mpjax.report.__main__ import main
from mpjax.train import read_manifest, write_manifest
from mpjax.train.report import to_line

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
EVIL = "</script><script>top.broken = 1</script><img src=x onerror='top.broken = 1'>"
LIMIT = 3_000_000


def run_of(
    steps: int, shift: float, *, seed: int = 0, skips: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    steps_taken = np.arange(1, steps + 1)
    losses = 2 + shift + 3 * np.exp(-steps_taken / steps * 5) + draw.normal(0, 0.05, steps)
    count, scale, found = 0, 65536.0, []
    for step, loss in zip(steps_taken.tolist(), losses.tolist(), strict=True):
        if step in skips:
            count, scale = count + 1, scale / 2
        found.append({"step": step, "loss": loss, "tokens_per_s": 1e4, "skipped": count,
                      "loss_scale": scale if skips else 1.0})  # fmt: skip
    return found


def outcomes(steps: int = 60, label: str = EVIL) -> list[Outcome]:
    arms = [("fp32", 0.0, ()), (label, 0.1, (5, 40))]
    return [
        Outcome.from_records(
            name, [run_of(steps, shift, seed=s, skips=skips) for s in range(3)], reference="fp32",
            validation_loss=[2.0 + shift + 0.01 * s + 0.02 * shift * s for s in range(3)],
        )
        for name, shift, skips in arms
    ]  # fmt: skip


FORMATS = ("e4m3", "e5m2", "fp16", "bf16")
TENSORS = (("decoder/layers/mlp", 0, 0.031), ("decoder/layers/mlp", 1, 0.0), (EVIL, None, 1e-3))
MONITOR = [
    {"step": 3, "kind": kind, "name": name, "layer": layer}
    | {f"underflow/{f}": share for f in FORMATS}
    | {f"overflow/{f}": 0.25 * (kind == "gradients") for f in FORMATS}
    for kind in ("weights", "gradients")
    for name, layer, share in TENSORS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny comparison, written as the experiments do, with everything that a page shows."""
    out = tmp_path_factory.mktemp("report")
    arms = outcomes()
    for o in arms[:1]:
        run = out / o.label / "seed0"
        run.mkdir(parents=True)
        page: dict[str, Any] = {"precision_text": "fp32", "versions": {"jax": "1"}, "commit": "abc"}
        page["config"] = {"lr": 0.1, "rule": [], "note": EVIL, "shape": {"layers": 2}}
        write_manifest(run, page | {"policies": {"decoder/mlp": "p=f32"}, "started": "2020"})
        (run / "metrics.jsonl").write_text("".join(to_line(r) + "\n" for r in o.records[0]))
        (run / "monitor.jsonl").write_text("".join(to_line(r) + "\n" for r in MONITOR))
        audit = mpjax.audit(lambda x: x @ x, np.ones((4, 4), np.float32))
        (run / "audit.json").write_text(json.dumps(audit.to_dict()))
    write_report(out, f"Title {EVIL}", arms, [f"A note. {EVIL}"], ["loss.png"])
    return out


class Parts(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_what_report_md_holds(folder):
    page = Parts((folder / "report.html").read_text())
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line[:2] == "| "]
    cells = [cell.strip() for line in lines for cell in line.split("|")]
    shown = " ".join(page.texts)
    assert len(cells) > 20
    assert [cell for cell in cells if cell != "---" and cell not in shown] == []
    assert "A note." in shown and "Student's t" in shown
    for section in ("gaps", "curves", "scale", "formats", "audit", "settings", "environment"):
        assert ("section", section) in [(tag, attrs.get("id")) for tag, attrs in page.tags], section
    assert "5, 40" in shown and "shape.layers" in shown and "would become zero" in page_titles(page)


def page_titles(page: Parts) -> str:
    return " ".join(attrs.get("title") or "" for _, attrs in page.tags)


def test_a_label_stays_text(folder):
    text = (folder / "report.html").read_text()
    page = Parts(text)
    assert [tag for tag, _ in page.tags].count("script") == 2  # the data and the page's own
    assert not [attrs for tag, attrs in page.tags if tag == "img" or "onerror" in attrs]
    assert EVIL in " ".join(page.texts)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert data["arms"] == ["fp32", EVIL]
    assert "<script>top" not in text and "</script><script>top" not in text


def test_nothing_is_named_that_lies_elsewhere(folder):
    text = (folder / "report.html").read_text()
    for tag, attrs in Parts(text).tags:
        for name in ("src", "href", "action", "srcset", "data", "style"):
            value = attrs.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize(("arms", "steps"), [(8, 20_000), (120, 200)])
def test_a_page_is_small_however_long_the_runs(arms, steps):
    runs = [run_of(steps, 0.0, seed=s, skips=tuple(range(1, steps, 7))) for s in range(2)]
    one = Outcome.from_records("arm 0", runs, validation_loss=[2.0, 2.1])
    long = [dataclasses.replace(one, label=f"arm {n}", reference="arm 0") for n in range(arms)]
    page = html_report(long, "Long")
    assert len(page.encode()) < LIMIT
    said = "of 20,000 points are drawn" if steps > 1000 else "48 of 120 arms are drawn"
    assert said in page


def test_a_short_run_is_drawn_in_full():
    page = html_report([Outcome.from_records("a", run_of(40, 0.0))], "One")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert len(data["loss"][0]["steps"]) == 21 and "points are drawn" not in page
    assert "gap" not in data and 'id="gaps"' not in page


def test_losses_that_are_not_finite_are_holes():
    run = run_of(60, 0.0)
    for record in run[30:]:
        record["loss"] = float("inf") if record["step"] % 2 else float("nan")
    page = html_report([Outcome.from_records("a", run)], "Broken")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    means = data["loss"][0]["mean"]
    assert means[0] is not None and means[-1] is None
    assert "nan" not in re.findall(r' d="([^"]*)"', page)


def test_a_damaged_file_is_named_and_the_rest_is_shown(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "fp32/seed0/audit.json").write_text('{"by_dtype": 3}')
    (copy / "fp32/seed0/manifest.json").write_text("{")
    write_report(copy, "Damaged", outcomes(), [], [])
    page = (copy / "report.html").read_text()
    assert "Files that could not be read" in page and "manifest.json is damaged" in page
    assert "is not what Audit.to_dict gives" in page and 'id="formats"' in page


# The command.


def test_the_command_writes_a_page_of_runs(folder, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert main([str(folder / "fp32"), "--out", str(out), "--title", "Mine"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "<h1>Mine</h1>" in out.read_text() and "class=tiles" in out.read_text()
    shutil.copytree(folder / "fp32", tmp_path / "b")
    page = read_manifest(tmp_path / "b" / "seed0") or {}
    # An older run lacks a setting; one that both have at nothing does not differ.
    page["config"] = {"lr": 0.2, "note": EVIL, "shape": {"layers": 2}, "unset": ""}
    write_manifest(tmp_path / "b" / "seed0", page)
    both = [str(folder / "fp32" / "seed0"), str(tmp_path / "b")]
    assert main([*both, "--out", str(out), "--reference", "b"]) == 0
    assert "What differs between the arms" in out.read_text()
    assert "against b" not in out.read_text()  # they have no validation
    assert "gap to the reference" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{folder}/gone"], "is no folder"),
        (["{folder}/fp32", "{folder}/fp32"], "named twice"),
        (["{folder}/fp32", "--reference", "bf16"], "'bf16' is none of fp32"),
        (["{folder}/fp32", "--window", "0"], "at least 1"),
        (["{folder}/fp32", "--out", "{folder}"], "is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments, part, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([text.format(folder=folder) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_arms_that_make_no_comparison_are_refused():
    with pytest.raises(ConfigError, match="compared with 'fp32'"):
        html_report(outcomes()[1:], "One")


# A real browser.

DRIVER = """
<body><script>
const widths = WIDTHS, found = {};
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const open = (name, source, width, plain) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900;
  if (plain) frame.sandbox = "allow-same-origin";  // and no allow-scripts
  frame.onload = () => done(frame);
  frame.src = source; document.body.append(frame);
});
const look = (frame) => {
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("main *")].filter((e) =>
    !e.closest(".scroll, svg") && e.getBoundingClientRect().right > root.clientWidth + 1);
  return {
    width: root.clientWidth, scroll: root.scrollWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 90)),
    loads: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
    tables: page.querySelectorAll("table").length, h1: page.querySelector("h1").textContent,
    lines: [...page.querySelectorAll("section path.line")].filter((e) => e.getBBox().width > 50)
      .length,
    disabled: page.querySelectorAll("button:disabled").length,
    smallest: Math.min(...[...page.querySelectorAll(".chart text")]
      .map((e) => e.getBoundingClientRect().height)),
  };
};
(async () => {
  for (const width of widths) {
    const frame = await open("page", "PAGE", width), page = frame.contentDocument;
    const result = look(frame), svg = page.querySelector("svg[data-chart=loss]");
    const view = frame.contentWindow, box = svg.getBoundingClientRect();
    const tip = svg.parentNode.querySelector(".tip");
    svg.dispatchEvent(new view.PointerEvent("pointermove",
      { clientX: box.left + box.width / 2, clientY: box.top + 9, bubbles: true }));
    result.hover = tip.hidden ? "" : tip.textContent;
    result.inside = tip.getBoundingClientRect().right <= page.documentElement.clientWidth + 1;
    svg.focus();
    result.focused = page.activeElement === svg;
    svg.dispatchEvent(new view.KeyboardEvent("keydown", { key: "End", cancelable: true }));
    result.end = tip.textContent;
    svg.dispatchEvent(new view.KeyboardEvent("keydown", { key: "Escape" }));
    result.escaped = tip.hidden;
    const button = page.querySelectorAll("button[data-arm]")[1];
    button.click();
    result.pressed = button.getAttribute("aria-pressed");
    const groups = [...page.querySelectorAll("g[data-arm]")];
    result.drawn = groups.filter((g) => view.getComputedStyle(g).display !== "none")
      .map((g) => g.dataset.arm);
    found[width] = result;
  }
  found.plain = look(await open("plain", "PAGE", 390, true));
  const bad = await open("bad", "BAD", 390);
  await wait(200);
  found.bad = look(bad);
  found.broken = window.broken ?? 0;
  document.body.textContent = "";
  const result = document.createElement("pre");
  result.id = "result"; result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>
"""


@pytest.fixture(scope="module")
def browsed(folder: Path) -> tuple[dict[str, Any], str]:
    """What a browser saw of the page in both widths, and what it logged."""
    if not BROWSER:
        pytest.skip(f"none of {' '.join(BROWSERS)} is here")
    page = folder / "report.html"
    bad = folder / "bad.html"  # a page that shows that the checks can fail
    bad.write_text(
        "<h1>x</h1><main><div style='width:900px'>wide</div></main>"
        "<img src='http://example.invalid/a.png'><script>top.broken = 2; missing()</script>"
    )
    driver = folder / "driver.html"
    text = DRIVER.replace("PAGE", page.as_uri()).replace("BAD", bad.as_uri())
    driver.write_text(text.replace("WIDTHS", "[1400, 390]"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--disable-background-networking", "--no-first-run", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1600,1000",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
        driver.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert match, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(match[1])), "\n".join(console)


@pytest.mark.parametrize("width", ["1400", "390"])
def test_a_browser_shows_it_in_both_widths(browsed, width):
    seen = browsed[0][width]
    assert seen["width"] in (int(width), int(width) - 15)  # with a scroll bar
    assert seen["scroll"] <= seen["width"] and seen["wide"] == []
    assert seen["tables"] > 6 and seen["lines"] >= 4 and EVIL in seen["h1"]
    assert seen["smallest"] > 9  # px of a text in a chart


@pytest.mark.parametrize("width", ["1400", "390"])
def test_pointer_and_keys_show_the_numbers(browsed, width):
    seen = browsed[0][width]
    # The middle of the drawing; its left margin is wider than the right one.
    assert re.match(r"step (28|29)", seen["hover"]) and EVIL in seen["hover"]
    assert re.search(r"2\.\d+  \[2\.\d+, 2\.\d+\]fp32", seen["hover"])
    assert seen["inside"] and seen["focused"] and seen["escaped"]
    assert seen["end"].startswith("step 50.5")  # the middle of the last 20 of 60
    assert seen["disabled"] == 0 and seen["pressed"] == "false"
    assert set(seen["drawn"]) == {"0"}


def test_it_fetches_nothing_and_logs_nothing(browsed):
    seen, console = browsed
    assert seen["1400"]["loads"] == seen["390"]["loads"] == []
    own = [line for line in console.splitlines() if "report.html" in line]
    assert [line for line in own if "'allow-scripts' permission is not set" not in line] == []
    assert seen["broken"] == 2  # the bad page's own, and no label's


def test_it_is_whole_without_javascript(browsed):
    seen = browsed[0]["plain"]
    assert (
        seen["tables"] == browsed[0]["390"]["tables"]
        and seen["lines"] == browsed[0]["390"]["lines"]
    )
    assert seen["disabled"] == 2 and seen["scroll"] <= seen["width"]


def test_the_checks_of_the_browser_can_fail(browsed):
    seen, console = browsed
    bad = seen["bad"]
    assert bad["loads"] == ["http://example.invalid/a.png"]
    assert bad["scroll"] > bad["width"] and bad["wide"]
    assert "missing is not defined" in console
