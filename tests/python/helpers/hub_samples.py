"""Names of the Hub for tests: caches laid out by hand, and a Hub on loopback."""

import hashlib
import json
import os
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import torch
from models import adapted, tiny_llama, tokens

from reslora import load, save_pretrained

NAME, BASE = "user/adapter", "user/base"
FIRST, SECOND = "1" * 40, "2" * 40  # commits
OPTIONS = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "res_mode": "bs"}
DROPPED = 0  # as a status: the connection ends without an answer


def lay(cache, name, commit, source, refs=(), below="."):
    """Lay a folder into a cache, as huggingface_hub does: blobs, links of a commit, refs."""
    place = cache / f"models--{name.replace('/', '--')}"
    for path in source.iterdir():
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = place / "snapshots" / commit / below / path.name
        for parent in (blob.parent, link.parent, place / "refs"):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    for ref in refs:
        (place / "refs" / ref).write_text(commit)


def empty_cache(folder, monkeypatch):
    """Return an empty cache below a folder, of a machine without network."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    return folder / "cache"


def write_adapter(folder, seed, **options):
    torch.manual_seed(seed)
    model = adapted(tiny_llama(), **OPTIONS | options)
    model.train()(tokens())  # for the norms
    save_pretrained(model, folder, statistics=True)
    return model


def write_base(folder, seed):
    torch.manual_seed(seed)
    model = tiny_llama()
    model.save_pretrained(folder)
    return model


def refusal(name=NAME, **place):
    """The sentence that `load` ends in."""
    with pytest.raises(FileNotFoundError) as caught:
        load(tiny_llama(), name, **place)
    text = str(caught.value)
    head = f"[load] the adapter must be a folder or a name of the Hub that can be had; got {name}"
    assert text.startswith(head) and "\n" not in text
    return text.removeprefix(head)


DROPPED = 0  # the connection ends without an answer


class Hub(ThreadingHTTPServer):
    """A Hub of one repository on loopback: `answers` of a folder, then a status that refuses."""

    def __init__(self, folder=None, status=200, code="", answers=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.status, self.code, self.answers = folder, status, code, answers
        self.asked = []

    @property
    def files(self):
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/api/agent-harnesses":  # huggingface_hub's own affair, now and then
            return self.answer(b'{"standardEnvVars": [], "harnesses": {}}')
        hub.asked.append(f"{self.command} {path}")
        if hub.status != 200 and len(hub.asked) > hub.answers:
            return None if hub.status == DROPPED else self.answer(b"", hub.status)
        if "/tree/" in path:
            rows = [{"type": "file", "path": file, "size": 1, "oid": file} for file in hub.files]
            return self.answer(json.dumps(rows).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": file} for file in hub.files]
            return self.answer(
                json.dumps({"id": NAME, "sha": FIRST, "siblings": siblings}).encode()
            )
        return self.answer((hub.folder / path.partition(f"/resolve/{FIRST}/")[2]).read_bytes())

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", FIRST)
        if self.server.code:
            self.send_header("X-Error-Code", self.server.code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(monkeypatch, **answers):
    """Run a Hub that huggingface_hub asks."""
    server = Hub(**answers)
    constants = huggingface_hub.constants
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # What it keeps of that answer would go to the home of whoever runs the tests.
        patch.setattr(constants, "AGENT_HARNESSES_PATH", os.devnull, raising=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
