"A headless Chromium for tests of pages"
import base64
import json
import shutil
import subprocess
import time
import urllib.request

import pytest


class Browser:
    "A headless Chromium, driven by its DevTools protocol"
    def __init__(self, program, profile):
        import websocket
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen([program, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = profile / "DevToolsActivePort"
        end = time.time() + 60
        while not (port.is_file() and port.read_text().strip()):
            assert time.time() < end and self.process.poll() is None, "Chromium did not start"
            time.sleep(.05)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as r: pages = json.load(r)
        address = next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Log"): self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def js(self, code):
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code):
        end = time.time() + 30
        while not self.js(code):
            assert time.time() < end, code
            time.sleep(.02)

    def open(self, path, width=1280, height=900, dark=False, ready="main > *"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
        self.call("Page.navigate", url="about:blank")
        address = path if str(path).startswith("http") else f"file://{path}"
        self.call("Page.navigate", url=address)
        self.until(f"location.protocol === {json.dumps(address.partition('//')[0])} && document.readyState === 'complete' && !!document.querySelector({json.dumps(ready)})")

    def shot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        assert path.stat().st_size > 5_000

    def complaints(self):
        "Errors and warnings of the console"
        return [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"
                or e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] in ("error", "warning")
                or e["method"] == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "warning", "assert")]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


def open_browser(tmp_path):
    "The body of a fixture: a browser, or the reason why there is none"
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program: pytest.skip("there is no Chromium on this machine: the page is not opened in a browser")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()
