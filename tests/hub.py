"""A server that answers as the Hugging Face hub does: every model of it is a small autoencoder and a small RADIO."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import save_file

from genfound.alignment.radio import tiny_state
from genfound.tokenizers.sd_vae import SDVAE
from genfound.tokenizers.weights import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve models that are made in a folder; the address for HF_ENDPOINT, and a list of what is downloaded."""
    load(SDVAE.kind, "random_tiny").save_pretrained(folder)
    prefix = "radio_model.model."
    save_file({f"{prefix}{name}": value for name, value in tiny_state().items()}, folder / "model.safetensors")
    downloads: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(self.path)

        def do_GET(self) -> None:
            self.answer(self.path)

        def answer(self, path: str) -> None:
            file = folder / path.rpartition("/")[2]
            if "/resolve/" in path and file.is_file():
                self.send(file.read_bytes(), "application/octet-stream")
                downloads.extend([path] if self.command == "GET" else [])
            elif "/tree/" in path:
                files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in listed()]
                self.send(json.dumps(files).encode(), "application/json")
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": f.name} for f in listed()]
                self.send(json.dumps({"id": "a/b", "sha": COMMIT, "siblings": siblings}).encode(), "application/json")
            else:
                self.send_error(404)

        def send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Content-Type": kind}
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, *_: object) -> None:
            pass

    def listed() -> list[Path]:
        return sorted(folder.iterdir())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        server.server_close()
