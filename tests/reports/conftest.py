"""A headless Chromium, spoken to through a pipe: what a page really does, without a library."""

import json
import os
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 60


class Page:
    """One tab, by the DevTools protocol; ``events`` is everything that the browser told."""

    def __init__(self, write, read):
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self._session, self.events = None, []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def _send(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            found = os.read(self._read, 65536)
            assert found, "the browser has ended"
            self._rest += found
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url):
        """Loads a page and waits until it is there."""
        self._send("Page.navigate", url=url)
        ended = time.monotonic() + SECONDS
        while time.monotonic() < ended:
            if (
                self.value("location.href") == url
                and self.value("document.readyState") == "complete"
            ):
                return
            time.sleep(0.05)
        raise AssertionError(f"{url} is not loaded")

    def value(self, expression):
        """What a JavaScript expression gives."""
        found = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector):
        """Clicks with the mouse in the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{box}.scrollIntoView({{block: 'center', inline: 'center'}})")
        rectangle = self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"({box}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": rectangle[0], "y": rectangle[1], "button": "left", "clickCount": 1}
            self._send("Input.dispatchMouseEvent", type=kind, **where)

    def type(self, selector, text):
        """Types a text into a field."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self._send("Input.insertText", text=text)

    def of(self, method):
        """The events of a kind that have come so far."""
        self.value("0")
        return [event["params"] for event in self.events if event.get("method") == method]


@pytest.fixture
def browser(tmp_path):
    """A page of a browser of its own; the test is skipped where none is installed."""
    if PROGRAM is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()
    # The browser reads its commands at 3 and answers at 4.
    command = f'exec "$@" 3<&{their_read} 4>&{their_write}'
    arguments = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,1000"]
    with subprocess.Popen(
        ["bash", "-c", command, "bash", *arguments],
        pass_fds=(their_read, their_write),
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(their_read)
        os.close(their_write)
        try:
            yield Page(write, read)
        finally:
            process.kill()
            os.close(write)
            os.close(read)
