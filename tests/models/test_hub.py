"""What the hub answers becomes one line with the cause and the next step; a local server answers in its place."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.hub import commit_of, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """Yield the address of a server that answers the path of each request by status, headers and body."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

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


def resolved(models: Sequence[tuple[str, str | None]], address: str, folder: Path, token: str = "") -> list[str]:
    """Return where each model and revision is, or the error: in another process, as the address is read at import."""
    environment = dict(os.environ) | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
    }
    script = (
        "import json, sys\nfrom neuronal_ray.cli.errors import BadInput\n"
        "from neuronal_ray.models.hub import resolve_model\n"
        "def answer(pair):\n"
        "    try: return str(resolve_model(*pair))\n"
        "    except BadInput as error: return str(error)\n"
        "print(json.dumps([answer(pair) for pair in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", script, json.dumps(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize(
    ("status", "code", "token", "expected"),
    [
        (401, "GatedRepo", "", ["is gated", "no token", "accept its terms at", "hf auth login"]),
        (403, "GatedRepo", "hf_x", ["is gated", "no access", "accept its terms at"]),
        (401, "RepoNotFound", "", ["does not exist", "or it is private", "hf auth login"]),
        (401, "", "hf_x", ["refuses the token", "hf auth login"]),
        (404, "RevisionNotFound", "", ["is no branch, tag or commit", "--revision"]),
        (503, "", "", ["answers 503", "retry later"]),
        (None, "", "", ["cannot be reached", "retry later"]),
    ],
)
def test_the_cause_and_the_next_step(
    status: int | None, code: str, token: str, expected: list[str], tmp_path: Path
) -> None:
    headers = {"X-Error-Code": code} if code else {}
    with hub(lambda _: (status or 500, headers, b"")) as address:
        (message,) = resolved([("a/b", None)], address if status else "http://127.0.0.1:9", tmp_path, token)
    assert message.startswith("--model: 'a/b'")
    assert all(part in message for part in expected), message


REPOSITORIES = {
    "a/shards": [
        *("config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors", "three.safetensors"),
        *("consolidated.safetensors", "params.json", "model.fp16.safetensors", "pytorch_model.bin", "README.md"),
        *("openvino/model.bin", "openvino/config.json", "qwen.tiktoken", "additional_chat_templates/tool.jinja"),
    ],
    "a/single": ["config.json", "model.safetensors", "model.safetensors.index.json", "one.safetensors", "a[1].json"],
    "a/pickles": ["config.json", "pytorch_model.bin"],
}


def answer(path: str) -> tuple[int, dict[str, str], bytes]:
    """Answer as the hub does: a repository's commit, its files, or a file, whose content is its name."""
    repository = next((name for name in REPOSITORIES if f"/{name}/" in f"{path}/"), None)
    if repository is None:
        return 404, {}, b""
    if "/resolve/" in path:
        name = unquote(path.split(f"{COMMIT}/", 1)[1])
        content = json.dumps({"metadata": {}, "weight_map": {"x": "one.safetensors", "y": "two.safetensors"}})
        body = (content if name.endswith("index.json") else name).encode()
        return 200, {"ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
    names = REPOSITORIES[repository]
    if "/tree/" in path:
        oids = {name: hashlib.sha1(name.encode()).hexdigest() for name in names}
        listed = [{"type": "file", "path": name, "size": len(name), "oid": oids[name]} for name in names]
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
    if not path.endswith("/revision/main") and "/revision/v2" not in path:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    siblings = [{"rfilename": name} for name in names]
    return 200, {}, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()


def test_one_copy_of_the_weights_and_their_companions_are_downloaded(tmp_path: Path) -> None:
    asked = [("a/shards", None), ("a/single", "v2"), ("a/pickles", None), ("a/single", "v3")]
    with hub(answer) as address:
        shards, single, pickles, unknown = resolved(asked, address, tmp_path)
    found = [
        sorted(file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file())
        for path in (shards, single, tmp_path / "hub" / "models--a--pickles" / "snapshots" / COMMIT)
    ]
    assert found[0] == [
        *("README.md", "additional_chat_templates/tool.jinja", "config.json", "model.safetensors.index.json"),
        *("one.safetensors", "qwen.tiktoken", "two.safetensors"),
    ]
    assert found[1:] == [["a[1].json", "config.json", "model.safetensors"], ["config.json"]]
    assert commit_of(Path(single)) == COMMIT
    assert pickles.startswith("--model: 'a/pickles': only safetensors are read, and a/pickles has pytorch_model.bin; ")
    assert "weights_only=True" in pickles
    assert unknown.startswith("--model: 'a/single' at revision 'v3' is no branch, tag or commit"), unknown


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a..b", "", "-x", "a\nb", "refs/", "x" * 9 + " "])
def test_a_revision_that_cannot_be_is_refused(revision: str) -> None:
    with pytest.raises(BadInput, match=r"^--revision: .* is no branch, tag or commit"):
        resolve_model("owner/name", revision)


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    for model in ("builtin", str(tmp_path)):
        with pytest.raises(BadInput, match=r"^--revision: 'main' is for models of the hub"):
            resolve_model(model, "main")
    with pytest.raises(BadInput, match=r"^--revision: 'v1' is another one than in the address"):
        resolve_model("https://huggingface.co/owner/name/tree/v2", "v1")
    assert commit_of(tmp_path) is None


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
