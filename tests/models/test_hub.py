"""What the hub answers becomes one line with the cause and the next step; a local server answers in its place."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.hub import resolve_model


@contextmanager
def hub(status: int, headers: dict[str, str]) -> Iterator[str]:
    """Yield the address of a server that gives every request the same answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "token", "expected"),
    [
        (401, "GatedRepo", "", ["is gated", "no token", "accept its terms at", "hf auth login"]),
        (403, "GatedRepo", "hf_x", ["is gated", "no access", "accept its terms at"]),
        (401, "RepoNotFound", "", ["does not exist", "or it is private", "hf auth login"]),
        (401, "", "hf_x", ["refuses the token", "hf auth login"]),
        (503, "", "", ["answers 503", "retry later"]),
        (None, "", "", ["cannot be reached", "retry later"]),
    ],
)
def test_the_cause_and_the_next_step(
    status: int | None, code: str, token: str, expected: list[str], tmp_path: Path
) -> None:
    """In a process of its own: the hub's address is read when its library is imported."""
    with hub(status or 500, {"X-Error-Code": code} if code else {}) as address:
        environment = dict(os.environ) | {
            "HF_ENDPOINT": address if status else "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
        }
        script = (
            "import json, sys\nfrom neuronal_ray.cli.errors import BadInput\n"
            "from neuronal_ray.models.hub import resolve_model\n"
            "try: resolve_model('a/b')\nexcept BadInput as error: print(json.dumps(str(error)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=True
        )
    message = json.loads(done.stdout.splitlines()[-1])
    assert message.startswith("--model: 'a/b'")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("https://huggingface.co/datasets/a/b", "is not the address of a model"),
        ("https://example.org/a/b", "is not the address of a model"),
        ("nowhere.gguf", "is a GGUF file"),
        ("~nobody-of-this-name/model", "there is no such user"),
        ("a" * 300, "too long"),
    ],
)
def test_what_is_no_model_is_refused_without_asking_the_hub(model: str, expected: str) -> None:
    with pytest.raises(BadInput, match=f"^--model: .*{expected}"):
        resolve_model(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="is a file, expected a directory with config"):
        resolve_model(str(tmp_path / "model.safetensors"))
