"""Headless Chromium, driven through a pipe: no driver, no package, no network. Used by the tests that open pages."""
import fcntl, json, os, shutil, subprocess, tempfile, threading, time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --hide-scrollbars "
         "--disable-features=OptimizationHints,MediaRouter,Translate --remote-debugging-pipe").split()

def find():  # path of a Chromium, or None
    return next((p for p in map(shutil.which, NAMES) if p), None)

def serve(folder):  # (server, address) of a folder on this machine's loopback interface
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"

class Browser:
    "One page of a headless Chromium, spoken to in the DevTools protocol over file descriptors 3 and 4."
    def __init__(self, width=1280, height=900):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_read, self.to_write = self._pipe()
        self.from_read, to_answer = self._pipe()
        start = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_answer}', "bash", find(), *FLAGS,
                 f"--user-data-dir={self.profile}", f"--window-size={width},{height}"]
        self.process = subprocess.Popen(start, pass_fds=(to_read, to_answer), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(to_read), os.close(to_answer)
        self.count, self.buffer, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"): self.call(f"{domain}.enable")

    def _pipe(self):  # both ends far from the numbers that the child needs
        return [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in os.pipe()]

    def _message(self, until):  # the next message, or TimeoutError
        while b"\0" not in self.buffer:
            left = until - time.time()
            import select
            if left <= 0 or not select.select([self.from_read], [], [], left)[0]: raise TimeoutError("no answer from Chromium")
            if not (data := os.read(self.from_read, 1 << 20)): raise EOFError("Chromium has closed its pipe")
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(head)

    def call(self, method, timeout=60, **params):
        "Call a method of the protocol and return its result; events on the way are kept."
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if self.session: message["sessionId"] = self.session
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        until = time.time() + timeout
        while (got := self._message(until)).get("id") != message["id"]: self.events.append(got)
        if "error" in got: raise RuntimeError(f"{method}: {got['error']}")
        return got["result"]

    def visit(self, url, timeout=60):
        "Open a page, wait until it has loaded, and return the events on the way."
        self.events = []
        self.call("Page.navigate", url=url)
        until = time.time() + timeout
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events): self.events.append(self._message(until))
        return self.events

    def run(self, script):
        "Run JavaScript in the page and return its value; promises are awaited."
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got: raise RuntimeError(str(got["exceptionDetails"])[:500])
        return got["result"].get("value")

    def screenshot(self, path, full=True):
        "Write a picture of the page."
        import base64
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        with open(path, "wb") as f: f.write(base64.b64decode(data))

    def close(self):
        "End the browser and remove its profile."
        try: self.session = None; self.call("Browser.close", timeout=5)
        except (OSError, TimeoutError, EOFError, RuntimeError): self.process.kill()
        self.process.wait(20)
        os.close(self.to_write), os.close(self.from_read)
        shutil.rmtree(self.profile, ignore_errors=True)
