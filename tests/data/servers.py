"""Real local servers for the loader's tests: HTTP with range requests and scripted misbehaviour, and moto's S3."""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Site:
    """A folder served over HTTP. ``script`` is consumed one action a GET of a tar: None = answer properly;
    ("status", code[, headers]), ("reset", n) = n bytes and a reset, ("short", n) = a proper answer of n bytes only,
    ("break", n) = n bytes of a longer answer and its end, ("stall", seconds) = silence. ``always`` is an action for
    every GET of a tar.
    ``closed`` = the end of a path -> status of every answer to it. ``log`` = (path, start, stop, sent)."""

    folder: Path
    url: str = ""
    ranges: bool = True
    script: list = field(default_factory=list)
    always: tuple | None = None
    closed: dict[str, int] = field(default_factory=dict)
    log: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def _handler(site: Site):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _file(self):
            path = site.folder / self.path.lstrip("/")
            status = next((code for end, code in site.closed.items() if self.path.endswith(end)), 404)
            if path.is_file() and status == 404:
                return path.read_bytes()
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self):
            data = self._file()
            if data is not None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

        def do_GET(self):
            data = self._file()
            if data is None:
                return
            start, stop, status = 0, len(data), 200
            if site.ranges and self.headers.get("Range"):
                low, high = self.headers["Range"].removeprefix("bytes=").split("-")
                start, stop, status = int(low), min(int(high) + 1, len(data)), 206
            action = None
            if self.path.endswith(".tar"):
                with site.lock:
                    action = site.always or (site.script.pop(0) if site.script else None)
            if start >= len(data):
                action = ("status", 416)
            if action and action[0] == "status":
                site.log.append((self.path, start, stop, 0))
                self.send_response(action[1])
                for name, value in (action[2] if len(action) > 2 else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if action and action[0] == "stall":
                time.sleep(action[1])
                self.close_connection = True
                return
            body = data[start:stop]
            sent = body[: action[1]] if action else body
            site.log.append((self.path, start, stop, len(sent)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent) if action and action[0] == "short" else len(body)))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(sent)
            if action and action[0] == "break":
                self.close_connection = True
            if action and action[0] == "reset":
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

    return Handler


@contextlib.contextmanager
def http_site(folder: Path):
    """Serve ``folder``; yields the Site."""
    site = Site(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # a reset is the point of some tests
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def s3_bucket(folder: Path, bucket: str = "shards"):
    """moto's S3 server with the files of ``folder``; yields (endpoint, client). Set the environment before use."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )
    client.create_bucket(Bucket=bucket)
    for path in folder.iterdir():
        client.put_object(Bucket=bucket, Key=path.name, Body=path.read_bytes())
    yield endpoint, client
    server.stop()
