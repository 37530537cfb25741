"""Headless Chromium through chromedriver's own HTTP protocol (WebDriver, W3C), which needs no package."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"enter": "\ue007", "escape": "\ue00c"}


class Browser:
    """One window; `wait` polls what JavaScript returns until it is true."""

    def __init__(self, *, width: int = 1280, height: int = 800, dark: bool = False, mobile: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
        options: dict[str, Any] = {"binary": CHROMIUM, "args": [*arguments, *(["--blink-settings=preferredColorScheme=0"] if dark else [])]}
        if mobile:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2, "touch": True}}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})
                break
            except ConnectionError:
                time.sleep(0.1)
            except urllib.error.URLError:
                time.sleep(0.1)
        self.session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        self._call("POST", f"{self.session}/url", {"url": url})

    def run(self, script: str, *values: Any) -> Any:
        """The value of a function body of JavaScript."""
        return self._call("POST", f"{self.session}/execute/sync", {"script": script, "args": list(values)})

    def wait(self, expression: str, *values: Any, seconds: float = 30) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.time() + seconds
        while not (found := self.run(f"return {expression}", *values)):
            assert time.time() < deadline, f"{expression} did not come true; the page says {self.text()!r:.2000}"
            time.sleep(0.05)
        return found

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def click(self, selector: str) -> Any:
        for _ in range(20):  # a page that draws itself anew replaces its elements
            try:
                return self._call("POST", f"{self._find(selector)}/click", {})
            except AssertionError as error:
                if "stale element" not in str(error):
                    raise
        raise AssertionError(f"{selector} is never there for long enough to be clicked")

    def type(self, selector: str, text: str) -> None:
        self._call("POST", f"{self._find(selector)}/value", {"text": text})

    def press(self, key: str) -> None:
        """A key, to whatever has the focus."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        self._call("POST", f"{self.session}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def accept(self) -> None:
        """Say yes to a dialog."""
        self._call("POST", f"{self.session}/alert/accept", {})

    def complaints(self) -> list[str]:
        """What the console says in earnest, such as breaches of the page's policy."""
        entries = self._call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self.session}/screenshot")))

    def close(self) -> None:
        try:
            self._call("DELETE", self.session)
        finally:
            self.process.terminate()
            self.process.wait(10)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, selector: str) -> str:
        found = self._call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        return f"{self.session}/element/{found[_ELEMENT]}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        opener: Callable[..., Any] = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        try:
            with opener(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']:.500}") from None
