"""A headless Chromium, driven over its DevTools protocol through two pipes: no driver, no port."""

import base64
import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.debian import program

# Resolves once the page's text holds all of the words: the page's own changes wake it.
_UNTIL = """
new Promise((found, failed) => {
  const words = %s;
  const text = () => document.body ? document.body.innerText + ' ' + document.title : '';
  const look = () => { if (words.every(word => text().includes(word))) { watch.disconnect(); found(text()); } };
  const watch = new MutationObserver(look);
  watch.observe(document, {subtree: true, childList: true, characterData: true});
  setTimeout(() => failed(new Error('the page says: ' + text().slice(0, 3000))), %d);
  look();
})
"""


class Page:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        """Descriptors of the pipes to and from the browser."""
        self._commands, self._answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self._number, self._session = 0, ""
        self._rest = b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)

    def send_headers(self, headers: Mapping[str, str]) -> None:
        """With every request from now on."""
        self._call("Network.enable")
        self._call("Network.setExtraHTTPHeaders", headers=dict(headers))

    def open(self, url: str) -> None:
        answer = self._call("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"

    def text(self, *words: str, limit: float = 60.0) -> str:
        """All text of the page once it holds these words. Raises AssertionError after `limit` seconds, with what it says instead."""
        return str(self.evaluate(_UNTIL % (json.dumps(words), limit * 1000)))

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"].get("description", answer)
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._commands.close()
        self._answers.close()

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> bytes:
        while b"\0" not in self._rest:
            more = self._answers.read1(1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return message


def _pipe() -> tuple[int, int]:
    """With numbers that are not those of the protocol."""
    found = os.pipe()
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in found]
    for fd in found:
        os.close(fd)
    return above[0], above[1]


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser of its own, without what the user's browsers know."""
    chromium = program("chromium", "chromium")
    (command_out, command_in), (answer_out, answer_in) = _pipe(), _pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --no-proxy-server"
        # The protocol's descriptors are 3 and 4, whatever numbers the pipes have here.
        script = f'exec "$0" {options} --user-data-dir={profile} --remote-debugging-pipe 3<&{command_out} 4>&{answer_in}'
        process = subprocess.Popen(
            ["bash", "-c", script, chromium],
            pass_fds=(command_out, answer_in),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_out)
        os.close(answer_in)
        page = Page(command_in, answer_out)
        try:
            yield page
        finally:
            page.close()  # which ends the browser
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
