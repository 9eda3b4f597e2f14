"""The report and the pool page in a real browser: they fit the window, and the filters work by mouse and keyboard.

The tests control Chromium over a pipe (--remote-debugging-pipe), so they need only the browser. Set LSMIX_PHOTOGRAPHS
to a folder to keep the screenshots.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lsmix.data.pool import open_pool
from lsmix.pipeline.views.pool_page import render_pool_page

pytestmark = pytest.mark.slow

SECONDS = 60  # timeout for an answer; generous for busy machines

# Chromium reads commands from descriptor 3 and answers on 4, not on the pipes' own numbers.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page in a headless Chromium, controlled by the DevTools protocol."""

    def __init__(self, program, folder):
        down, self._write = os.pipe()
        self._read, up = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command = [
            sys.executable,
            "-c",
            LAUNCH,
            str(down),
            str(up),
            program,
            *flags,
            f"--user-data-dir={folder}/profile",
        ]
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(down, up), stdout=log, stderr=log)
        os.close(down)
        os.close(up)
        self._buffer = b""
        self._number = 0
        self._session = ""
        self.events = []

    def start(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _next(self):
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            block = os.read(self._read, 1 << 20)
            assert block, "Chromium exited"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, page, *, width=1400, theme="light", scripts=True):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector):
        self.ask(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.ask(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, code, times=1):
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def photograph(self, target):
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        target.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        os.close(self._write)  # Chromium exits when its pipe is closed
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium on the PATH")
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    try:
        opened.start()
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def pool_folder(finished_workspace):
    named = os.environ.get("LSMIX_PHOTOGRAPHED_POOL")  # use another pool for the screenshots
    return Path(named) if named else next((finished_workspace / "mix").glob("lsmix-*"))


@pytest.fixture(scope="module")
def page(pool_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "pool.html"
    target.write_text(render_pool_page(pool_folder)[0], encoding="utf-8")
    return target


CARDS = ".samples:not(.failures) > li"
VISIBLE = """Array.from(document.querySelectorAll('.samples:not(.failures) > li')).filter(card => card.checkVisibility())
    .map(card => ({...card.dataset}))"""


UNFOLD = "document.querySelectorAll('details').forEach(part => { part.open = true; })"
# Elements that can be scrolled horizontally, and elements that extend beyond the page.
SIDEWAYS = """Array.from(document.querySelectorAll('body *')).filter(one => {
    const style = getComputedStyle(one), box = one.getBoundingClientRect();
    return (['auto', 'scroll'].includes(style.overflowX) && one.scrollWidth > one.clientWidth + 1)
        || (box.width > 0 && box.right > innerWidth + 1 && style.position !== 'absolute');
}).map(one => one.outerHTML.slice(0, 80))"""


def visible(browser):
    return list(browser.ask(VISIBLE))


def complaints(browser):
    browser.ask("1")  # its answer arrives after all pending events
    return [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]


def choose(browser, selector, place):
    """Choose an entry of a list by keyboard, since the open list is not part of the page."""
    browser.ask(f"document.querySelector({selector!r}).focus()")
    browser.press("Home", 36)
    browser.press("ArrowDown", 40, times=place)


def test_filters_show_exactly_the_matching_samples(browser, page, pool_folder):
    browser.open(page)
    browser.ask(UNFOLD)
    everything = visible(browser)
    assert len(everything) == browser.ask(f"document.querySelectorAll('{CARDS}').length") > 50
    assert (
        browser.ask("document.getElementById('shown').textContent")
        == f"{len(everything)} of {len(everything)} samples shown"
    )

    choose(browser, "#label", 1)
    label = browser.ask("document.getElementById('label').value")
    assert label
    assert visible(browser) == [card for card in everything if label in card["classes"].split()]

    browser.ask("document.getElementById('low').focus()")
    browser.press("ArrowRight", 39, times=6)
    assert browser.ask("document.getElementById('low-value').textContent") == "0.30"
    fitting = [card for card in everything if label in card["classes"].split() and float(card["share"]) >= 0.3]
    assert visible(browser) == fitting
    browser.click("input[value=lam]")
    fitting = [card for card in everything if label in card["classes"].split() and float(card["lam"]) >= 0.3]
    assert visible(browser) == fitting
    assert str(len(fitting)) == browser.ask("document.getElementById('shown').textContent").split()[0]

    browser.click("button[type=reset]")
    browser.ask("new Promise(done => setTimeout(done, 50))")
    assert visible(browser) == everything
    assert complaints(browser) == []
    assert len(open_pool(pool_folder)) >= len(everything)
    asked = [event["params"]["request"]["url"] for event in browser.events if event["method"].endswith("WillBeSent")]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_the_status_filter_works_and_an_empty_result_shows_a_message(browser, page):
    browser.open(page)
    browser.ask(UNFOLD)
    everything = visible(browser)
    events = browser.ask("Array.from(document.getElementById('status').options).map(option => option.value)")
    for place, event in enumerate(events[1:], start=1):
        choose(browser, "#status", place)
        assert visible(browser) == [card for card in everything if card["status"] == event]
    browser.ask("document.getElementById('low').value = 0.5; document.getElementById('high').value = 0.5")
    browser.ask("document.getElementById('label').dispatchEvent(new Event('input', {bubbles: true}))")
    left = visible(browser)
    assert browser.ask("document.getElementById('nothing').checkVisibility()") == (not left)


def test_the_tab_key_reaches_every_filter_in_reading_order(browser, page):
    browser.open(page)
    reached = []
    browser.click("summary")
    assert browser.ask("document.querySelector('details').open")
    for _ in range(6):
        browser.press("Tab", 9)
        reached.append(browser.ask("document.activeElement.name || document.activeElement.textContent"))
    assert reached == ["label", "status", "by", "low", "high", "Show all"]


def test_without_javascript_all_samples_are_shown_and_the_filters_are_hidden(browser, page):
    browser.open(page, scripts=False)
    assert len(visible(browser)) == 9
    browser.ask(UNFOLD)
    shown = visible(browser)
    assert len(shown) == browser.ask(f"document.querySelectorAll('{CARDS}').length")
    assert not browser.ask("document.getElementById('filter').checkVisibility()")
    assert "The filters need JavaScript" in browser.ask("document.body.innerText")
    browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_only_the_script_of_the_template_may_run(browser, page, tmp_path):
    text = page.read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    changed.write_text(
        text.replace("</main>", "<script>document.title = 'taken over'</script></main>"), encoding="utf-8"
    )
    browser.open(changed)
    assert browser.ask("document.title") != "taken over"
    assert any("Content Security Policy" in event["params"]["entry"]["text"] for event in complaints(browser))


@pytest.fixture(scope="module")
def report(finished_workspace):
    (folder,) = (finished_workspace / "report").iterdir()
    return folder / "report.html"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("which", ["report", "page"])
def test_pages_fit_the_window_and_are_readable_in_both_themes(which, width, theme, browser, request, tmp_path):
    browser.open(request.getfixturevalue(which), width=width, theme=theme)
    assert browser.ask("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
    assert browser.ask("document.documentElement.scrollHeight") < 6000
    assert browser.ask("document.images[0].getBoundingClientRect().top") < 900  # pictures come first
    # Text and background must have the contrast that WCAG 2 requires for small text.
    for text, behind in (
        ("ink", "page"),
        ("soft", "page"),
        ("soft", "card"),
        ("accent", "page"),
        ("warn", "warn-soft"),
    ):
        assert contrast(colour(browser, text), colour(browser, behind)) >= 4.5, (theme, text, behind)
    folder = Path(os.environ.get("LSMIX_PHOTOGRAPHS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    photograph = folder / f"{which}-{width}-{theme}.png"
    browser.photograph(photograph)
    with Image.open(photograph) as picture:
        assert picture.width == width
        assert 1000 < picture.height < 6000
        corner = sum(picture.convert("RGB").getpixel((2, 2))) / 3
    assert (corner < 60) == (theme == "dark")
    browser.ask(UNFOLD)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(SIDEWAYS) == []


def colour(browser, name):
    value = browser.ask(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim().slice(1)")
    digits = value if len(value) == 6 else "".join(2 * digit for digit in value)
    return tuple(bytes.fromhex(digits))


def contrast(first, second):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
