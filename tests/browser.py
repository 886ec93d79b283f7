"""A real browser for tests, driven by the protocol of WebDriver (W3C) with the standard library alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WHY_NOT = "needs a browser: Debian's packages chromium and chromium-driver"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
# What WebDriver calls an element in JSON.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, address: str, folder: Path) -> None:
        self._address = address
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}", "--window-size=1300,1000"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, content: object = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._address + path, body, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def do(self, path: str, content: object = None) -> Any:
        """One command of the session; a GET without content."""
        return self._ask("GET" if content is None else "POST", self._session + path, content)

    def close(self) -> None:
        self._ask("DELETE", self._session)

    def open(self, page: Path) -> None:
        """Load a page; what was logged before is forgotten."""
        # A new window has a page of the browser's own, which asks for much.
        self.do("/url", {"url": "about:blank"})
        self.log("browser"), self.log("performance")
        self.do("/url", {"url": page.as_uri()})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call."""
        return self.do("/se/log", {"type": kind})

    def requested(self) -> list[str]:
        """Every address that was asked for since the last look at the log."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a function returns in the page. (The driver is not bound by the page's policy.)"""
        return self.do("/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        return self.do(f"/element/{self._find(selector)}/text")

    def click(self, selector: str) -> None:
        self.do(f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.do(f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.do("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def choose(self, label: str, option: str) -> None:
        """Choose an option of the list with this label."""
        self.run(
            "const label = [...document.querySelectorAll('#choices label')].find((one) => "
            "one.firstChild.textContent === arguments[0]); const select = label.querySelector('select');"
            "select.value = [...select.options].find((one) => one.text === arguments[1]).value;"
            "select.dispatchEvent(new Event('input', { bubbles: true }));",
            label,
            option,
        )

    def _find(self, selector: str) -> str:
        return self.do("/element", {"using": "css selector", "value": selector})[ELEMENT]


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in a folder."""
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with driver:
        try:
            assert driver.stdout is not None
            ports = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)
            port = next(found[1] for found in ports if found)
            browser = Browser(f"http://127.0.0.1:{port}", folder)
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
