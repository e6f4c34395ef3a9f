"""Headless Chromium over a pipe, by its DevTools protocol: no driver and no library, only the browser itself."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
PATIENCE = 120  # seconds


class Browser:
    """One tab. Close it: `with Browser() as browser`."""

    def __init__(self) -> None:
        assert CHROMIUM
        self.profile = tempfile.mkdtemp(prefix="minidpo-browser-")
        told, self.write = os.pipe()
        self.read, answers = os.pipe()
        # the browser reads commands from descriptor 3 and answers on 4; the shell puts them there
        command = f'exec "$@" 3<&{told} 4>&{answers}'
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", *arguments],
            pass_fds=(told, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(told)
        os.close(answers)
        self.rest, self.number, self.session = b"", 0, None
        self.heard: list[dict[str, Any]] = []
        (page,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.write)
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            assert answer.get("method") != "Page.javascriptDialogOpening", "the page opened a dialog"
            self.heard.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], PATIENCE)[0], "the browser does not answer"
            part = os.read(self.read, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, file: Path, width: int = 1000, dark: bool = False, fragment: str = "") -> None:
        """Show a file; returns once it is loaded. `heard` is what the page caused since."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")
        self.run("1")
        self.heard = []
        self.call("Page.navigate", url=file.resolve().as_uri() + fragment)
        while not any(one.get("method") == "Page.loadEventFired" for one in self.heard):
            self.heard.append(self._next())
        self.run("new Promise((done) => setTimeout(done, 60))")

    def run(self, code: str) -> Any:
        """The value of an expression on the page, a promise's once it is kept."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))
