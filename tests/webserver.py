"""A server of files for tests: byte ranges, and faults that are told to it."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextmanager
def served(folder: Path, **faults):
    """-> (address of the folder, requests so far as (name, first byte)).

    faults: `ranges=False`: the whole file is sent whatever is asked for; `breaks={name: n}`: n answers end halfway;
    `status={name: code}`: that is all that is answered; `token`: what the query must be.
    """
    asked, breaks = [], dict(faults.get("breaks", {}))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            parts = urlsplit(self.path)
            name = unquote(parts.path).lstrip("/")
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(found[1]) if found else 0
            asked.append((name, start))
            path, status = folder / name, faults.get("status", {}).get(name)
            if faults.get("token") and parts.query != faults["token"]:
                status = 403
            elif not path.is_file():
                status = 404
            if status:
                return self.answer(status, b"")
            content = path.read_bytes()
            if found and faults.get("ranges", True):
                if start >= len(content):
                    return self.answer(416, b"")
                content = content[start : int(found[2]) + 1 if found[2] else None]
                return self.answer(206, content, name)
            return self.answer(200, content, name)

        def answer(self, status, content, name=""):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if breaks.get(name, 0):
                breaks[name] -= 1
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
