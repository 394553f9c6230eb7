"""A real MLflow server on loopback, and the ways in which a server can be bad."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.pool import free_port

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
QUIET["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven more processes that tracking does not need


class Server:
    """``mlflow server`` on its own SQLite file; can be killed and started again on the same port."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.database = f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self.port}"

    def launch(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.database, "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **QUIET}, start_new_session=True
            )
        return self

    def ready(self, seconds=300.0):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.uri + "/health", timeout=2) as answer:
                    if answer.status == 200:
                        return self
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        raise AssertionError(f"mlflow server is not ready after {seconds} s")

    def kill(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()


@contextlib.contextmanager
def black_hole():
    """Accepts connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    held, stop = [], threading.Event()
    listener.settimeout(0.2)

    def run():
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                held.append(listener.accept()[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        for connection in [*held, listener]:
            connection.close()


class _Broken(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"Internal Server Error")

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *args):
        """No lines in the test's output."""


@contextlib.contextmanager
def broken():
    """Answers 500 to everything."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _Forward(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.target)) as behind:
            threading.Thread(target=self._copy, args=(self.request, behind, False), daemon=True).start()
            self._copy(behind, self.request, True)

    def _copy(self, source, sink, answer):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.server.delay if answer else 0.0)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class _Proxy(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads = True, True


@contextlib.contextmanager
def slow(port, delay):
    """A real server behind a line on which each piece of an answer takes ``delay`` seconds (``.delay`` may change)."""
    with _Proxy(("127.0.0.1", 0), _Forward) as proxy:
        proxy.target, proxy.delay = port, delay
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        proxy.uri = f"http://127.0.0.1:{proxy.server_address[1]}"
        yield proxy
        proxy.shutdown()
