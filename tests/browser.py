"""A headless Chromium for tests of pages: what a reader would see, and what the browser complains about.

In: an HTML file and a width. Out: `Seen`. It is driven through a pipe (`--remote-debugging-pipe`), so that nothing but the browser is needed. `MISSING` says why
there is none, or is empty.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.runs import with_the_tests

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
MISSING = "" if PROGRAM else "Chromium is not installed here (Debian: apt-get install chromium)"
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
LOOK = """({
  wider: document.documentElement.scrollWidth - window.innerWidth,
  images: document.images.length,
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
  nameless: [...document.images].filter(i => !i.alt).length,
  dead: [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.getElementById(a.hash.slice(1))).map(a => a.hash),
  text: document.body.innerText,
})"""


@dataclass(frozen=True)
class Seen:
    """What a page looks like at one width.

    Attributes
    ----------
    errors : what the console and the page's scripts complain about.
    requests : addresses asked for besides the page itself and what lies in it as data.
    wider : pixels by which the page is wider than the window: it would scroll sideways.
    images, broken, nameless : how many images there are; the texts of those that did not load; how many have no text.
    dead : links to places of the page that are not there.
    text : what can be read.
    """

    errors: list[str]
    requests: list[str]
    wider: int
    images: int
    broken: list[str]
    nameless: int
    dead: list[str]
    text: str


class Browser:
    """A running Chromium; a context manager."""

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        die = with_the_tests()

        def hand_over() -> None:  # Chromium reads commands from descriptor 3 and answers on 4
            spare = os.dup(to_write), os.dup(to_read)
            os.dup2(spare[1], 3)
            os.dup2(spare[0], 4)
            die()

        self._process = subprocess.Popen(
            [PROGRAM, *FLAGS, f"--user-data-dir={self._folder.name}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, close_fds=False, preexec_fn=hand_over,  # noqa: PLW1509  it takes no lock
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest, self._events = 0, b"", []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def see(self, page: Path, width: int, picture: Path | None = None) -> Seen:
        """Open a file in a window `width` pixels wide; with `picture`, save what the whole page looks like as PNG."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        address = page.resolve().as_uri()
        self._call("Page.navigate", url=address)
        self._until("Page.loadEventFired")
        found = self._call("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        if picture is not None:
            shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        errors, requests = [], []
        for event in self._events:
            method, values = event["method"], event["params"]
            if method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                errors.append(values["entry"]["text"])
            elif method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning")):
                errors.append(json.dumps(values)[:300])
            elif method == "Network.requestWillBeSent" and not values["request"]["url"].startswith(("data:", address)):
                requests.append(values["request"]["url"])
        return Seen(errors=errors, requests=requests, **found)

    def _call(self, method: str, **values: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._events.append(answer)

    def _until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict:
        until = time.monotonic() + 120
        while b"\0" not in self._rest:
            part = os.read(self._from, 2**20)
            assert part and time.monotonic() < until, "Chromium has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
