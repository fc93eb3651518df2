"""What does a reader of a movie see, and what goes wrong in the page? Movies in a real browser, opened from disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = {"width": 1280, "height": 900}

# The picture of the present frame, as it stands in the page; as JSON, which is faster than what playwright does.
PICTURE = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const text = (root, selector) => root.querySelector(selector)?.textContent ?? "";
  return JSON.stringify({
    cells: all(".cell[data-block]").map(cell => ({
      block: Number(cell.dataset.block), badge: text(cell, ".badge"), lost: text(cell, ".text s"),
      words: text(cell, ".text").slice(text(cell, ".text s").length),  // what is lost stands before them
      state: ["free", "cached", "shared", "held"].find(state => cell.classList.contains(state)),
      share: parseFloat(cell.style.getPropertyValue("--share")),
    })),
    boxes: all("[data-box]").map(box => [...box.dataset.box.split(" "), box.dataset.at].map(Number)
      .concat(text(box, ".text"))),
    links: all("[data-link]").map(link => Number(link.dataset.link)),
    focus: player.scene.focus,
    shown: Object.fromEntries(all("[data-figure]").map(figure => [figure.dataset.figure, figure.textContent])),
    figures: player.scene.replay.figures(),
  });
}"""

# Texts whose contrast against what lies behind them is too small, as [contrast, colours, text].
LOW_CONTRAST = """least => {
  const parse = colour => {
    const [r, g, b, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
    return {rgb: [r, g, b], alpha};
  };
  const over = ({rgb, alpha}, below) => rgb.map((part, i) => part * alpha + below[i] * (1 - alpha));
  const luminance = rgb => rgb.map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const parentOf = element => element.parentElement;
  // All colours that may lie behind an element's text: a gradient or a hatch has several.
  const behind = element => {
    if (!element) return [[255, 255, 255]];
    const style = getComputedStyle(element), own = parse(style.backgroundColor);
    const stops = (style.backgroundImage.match(/rgba?\\([^)]*\\)/g) ?? []).map(parse);
    const seeThrough = own.alpha < 1 && (!stops.length || stops.some(({alpha}) => alpha < 1));
    const below = own.alpha < 1 ? (seeThrough ? behind(parentOf(element)) : [[0, 0, 0]])
      .map(rgb => over(own, rgb)) : [own.rgb];
    return stops.length ? stops.flatMap(stop => below.map(rgb => over(stop, rgb))) : below;
  };
  const opacity = element => element ? Number(getComputedStyle(element).opacity) * opacity(parentOf(element)) : 1;
  const found = [];
  const check = (element, colour, text) => {
    const {rgb, alpha} = parse(colour), all = alpha * opacity(element);
    for (const ground of behind(element)) {
      const ratio = contrast(over({rgb, alpha: all}, ground), ground);
      if (ratio < least) found.push([Number(ratio.toFixed(2)), `${colour} on ${ground.map(Math.round)}`, text]);
    }
  };
  let checked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility({visibilityProperty: true})) continue;
    if (!element.getClientRects().length || element.closest("svg, script, style, option")) continue;
    check(element, getComputedStyle(element).color, node.textContent.trim());
    checked++;
  }
  for (const select of document.querySelectorAll("select")) check(select, getComputedStyle(select).color, select.id);
  for (const input of document.querySelectorAll("[placeholder]"))
    check(input, getComputedStyle(input, "::placeholder").color, input.placeholder);
  return {checked, found};
}"""

# Without a timer of the page's own. (Playwright's wait_for_function would need an `eval` that the page does not allow.)
UNTIL = """async condition => {
  for (let looks = 0; !(CONDITION); looks++) {
    if (looks > 600) throw Error(`after ${looks} frames this is still false: ${condition}`);
    await new Promise(requestAnimationFrame);
  }
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window. Where there is none, the test is skipped, and says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives a browser, is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(PROGRAMS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"],
                                             ignore_default_args=["--disable-ipc-flooding-protection"])
        try:
            yield browser
        finally:
            browser.close()


class Movie:
    """A window for movies, one after another. `complaints` has what the console said, and what was fetched."""

    def __init__(self, browser: Browser, has_clock: bool = False, **options: Any) -> None:
        """`has_clock`: time passes only in `wait`. The options are those of a window."""
        self.path: Path | None = None
        self.complaints: list[str] = []
        self.page = browser.new_page(**{"viewport": WINDOW} | options)
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self._fetches(request.url))
        if has_clock:
            self.page.clock.install()

    def open(self, path: Path, fragment: str = "") -> Movie:
        self.page.goto("about:blank")  # or a change of the fragment alone would not load the page again
        self.path = path
        self.page.goto(path.as_uri() + fragment)
        return self

    def _fetches(self, url: str) -> None:
        if self.path is None or url.partition("#")[0] != self.path.as_uri():
            self.complaints.append(f"fetches {url}")

    def close(self) -> None:
        self.page.close()

    def js(self, expression: str, argument: Any = None) -> Any:
        return self.page.evaluate(expression, argument)

    def until(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        self.js(UNTIL.replace("CONDITION", condition), condition)

    def wait(self, ms: float) -> None:
        self.page.clock.run_for(ms)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def click(self, selector: str) -> None:
        self.page.click(selector)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def is_visible(self, selector: str) -> bool:
        return self.page.is_visible(selector)

    def show(self, scene: int, frame: int = 0) -> None:
        """Both count from 0."""
        self.js("([scene, frame]) => { if (player.number !== scene) player.open(scene); player.show(frame); }",
                [scene, frame])

    def ask(self, wanted: bool) -> None:
        """Whether the page asks before it shows what can be guessed."""
        self.js("wanted => { player.ask.checked = wanted; }", wanted)

    @property
    def at(self) -> int:
        """The frame that is shown."""
        return self.js("player.at")

    @property
    def is_playing(self) -> bool:
        return self.js("player.timer !== null")
