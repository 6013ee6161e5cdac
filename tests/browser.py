"""A page in a real browser: Chromium, where it is installed, driven through its DevTools pipe with the standard library alone.

open_page(path, width, dark) -> (text, console messages, requests); `Page` also evaluates scripts, measures contrast and takes pictures.
"""

import atexit
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe")
# Text in the page whose colour differs too little from what is behind it: [[ratio, text], ...], the worst first.
LOW_CONTRAST = """(least => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true})
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data].map(value => value / 255) }
  const over = (top, below) => below.map((value, i) => top[i] * top[3] + value * (1 - top[3]))
  const light = colour => colour.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, found = [], seen = new Map()
  const behind = element => {
    if (!element) return dark && getComputedStyle(document.documentElement).colorScheme.includes("dark") ? [0.07, 0.07, 0.07] : [1, 1, 1]
    if (!seen.has(element)) seen.set(element, over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement)))
    return seen.get(element)
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement, style = getComputedStyle(element), box = element.getBoundingClientRect()
    if (!node.data.trim() || !box.width || !box.height || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue
    const back = behind(element), front = rgba(element instanceof SVGElement ? style.fill : style.color)
    let opacity = front[3]
    for (let up = element; up; up = up.parentElement) opacity *= getComputedStyle(up).opacity
    const [a, b] = [light(over([...front.slice(0, 3), opacity], back)), light(back)]
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    if (ratio < least) found.push([ratio, node.data.trim().slice(0, 60)])
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 20)
})"""


class Browser:
    """One Chromium process for all pages of a test run; its pipe carries JSON that ends with NUL."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", f'exec 3<&{read} 4>&{write}; exec "$@"', "bash", *arguments], pass_fds=(read, write),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read), os.close(write)
        self.number, self.rest, self.events = 0, b"", []

    def call(self, method, session=None, **params):
        """Send a command and return its result; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], 60)[0], "the browser does not answer"
            part = os.read(self.read, 1 << 16)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def wait_for(self, method, session):
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self.receive())

    def close(self):
        self.call("Browser.close")
        self.process.wait(10)
        shutil.rmtree(self.profile, ignore_errors=True)


RUNNING = []


def browser():
    """The browser, started at its first use and ended with the tests."""
    if not RUNNING:
        RUNNING.append(Browser())
        atexit.register(RUNNING[0].close)
    return RUNNING[0]


class Page:
    """A file, opened `width` pixels wide in light or dark."""

    def __init__(self, path, width=1400, dark=False, script=True):
        self.browser = browser()
        target = self.browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.address = Path(path).resolve().as_uri()
        self.call("Page.navigate", url=self.address)
        self.browser.wait_for("Page.loadEventFired", self.session)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def events(self, *methods):
        return [event["params"] for event in self.browser.events if event.get("sessionId") == self.session and event["method"] in methods]

    def console(self):
        """What the page wrote to the console, and every error, a refusal of its security policy included."""
        self.evaluate("0")  # what came before its answer has been read
        logged = [str([argument.get("value") for argument in event["args"]]) for event in self.events("Runtime.consoleAPICalled")]
        thrown = [event["exceptionDetails"]["text"] for event in self.events("Runtime.exceptionThrown")]
        return logged + thrown + [event["entry"]["text"] for event in self.events("Log.entryAdded")]

    def requests(self):
        """The addresses that the page asked for, itself and what stands within it (data:) left out."""
        self.evaluate("0")
        asked = [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]
        return [url for url in asked if url.split("#")[0] != self.address and not url.startswith("data:")]

    def low_contrast(self, least=4.5):
        """Visible text below a contrast: [[ratio, text], ...], the worst first."""
        return self.evaluate(f"{LOW_CONTRAST}({least})")

    def too_wide(self):
        """Pixels by which the page is wider than its window: it would scroll sideways."""
        return self.evaluate("document.documentElement.scrollWidth - innerWidth")

    def screenshot(self, path, whole=False):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": self.whole()} if whole else {}))["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def whole(self):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}


def open_page(path, width=1400, dark=False):
    """Open a page; returns (its text, console messages, addresses that it asked for)."""
    page = Page(path, width, dark)
    return page.evaluate("document.body.innerText"), page.console(), page.requests()
