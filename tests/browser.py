"""Drives Chromium without a window, through chromedriver's WebDriver interface, which is JSON over HTTP.

Debian has both in the packages chromium and chromium-driver.
"""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in the WebDriver standard
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
CHROMEDRIVER = shutil.which("chromedriver") or ""
MISSING = "" if CHROMIUM and CHROMEDRIVER else "needs a browser: install chromium and chromium-driver"
WITHOUT_WINDOW = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


class Browser:
    """Holds a session of the browser."""

    def __init__(self, driver: str) -> None:
        self.driver = driver
        options = {"binary": CHROMIUM, "args": list(WITHOUT_WINDOW)}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self.session = f"{driver}/session"
        self.session += "/" + self.ask("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, command: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """Sends a command of the WebDriver standard and returns its value."""
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self.session + command, data, {"Content-Type": "application/json"}, None, False, method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.logged("performance")  # what was logged before this page does not count
        self.logged("browser")
        self.ask("/url", {"url": url})

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression on the page."""
        return self.ask("/execute/sync", {"script": f"return {script}", "args": []})

    def elements(self, selector: str) -> list[str]:
        return [each[ELEMENT] for each in self.ask("/elements", {"using": "css selector", "value": selector})]

    def click(self, selector: str) -> None:
        """Clicks on the only element of a selector as a reader does, with the mouse at its middle."""
        (element,) = self.elements(selector)
        self.ask(f"/element/{element}/click")

    def type(self, selector: str, text: str) -> None:
        (element,) = self.elements(selector)
        self.ask(f"/element/{element}/value", {"text": text})

    def texts(self, selector: str) -> list[str]:
        return [self.ask(f"/element/{element}/text", method="GET") for element in self.elements(selector)]

    def protocol(self, command: str, **params: Any) -> Any:
        """Sends a command of the browser's own protocol."""
        return self.ask("/goog/cdp/execute", {"cmd": command, "params": params})

    def logged(self, kind: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = self.ask("/se/log", {"type": kind})
        return lines

    def requests(self) -> list[str]:
        """Returns the addresses that were asked for since the last call or since the page was opened."""
        events = [json.loads(line["message"])["message"] for line in self.logged("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def errors(self) -> list[str]:
        """Returns the errors of scripts, and what the page's own policy refused."""
        return [line["message"] for line in self.logged("browser") if line["level"] == "SEVERE"]


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts the driver and a session, and ends both."""
    with subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            session = Browser(f"http://127.0.0.1:{port}")
            try:
                yield session
            finally:
                session.ask("", method="DELETE")
        finally:
            driver.terminate()
