"""Ray's token: one of its own for a Ray that this process starts, and a clear word where a Ray wants another."""

import atexit
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import grpc  # type: ignore[import-untyped]

from neuronal_ray.cli.errors import BadInput

logger = logging.getLogger(__name__)

_RAY_S, _CLIENT_S = "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.RayletDriver/ClusterInfo"
"""Questions that a Ray, and its server for clients, answer to those with the token."""
_ANSWER_TIMEOUT_S = 10.0
_GIVEN_BY = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_NEEDED = (
    "the Ray at {!r} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that has it "
    "(by default ~/.ray/auth_token, see docs/cluster.md)"
)


def use_own_token() -> None:
    """Give the Ray that this process starts a token that goes with the process.

    Ray itself would leave one in the home directory, for which every later `ray start` asks. What the environment says
    about tokens stays in force.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(name in os.environ for name in _GIVEN_BY):
        return
    folder = Path(tempfile.mkdtemp(prefix="neuronal-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")  # Ray reads it once in a process


def check_token(address: str) -> None:
    """Raise BadInput when there is no Ray at HOST:PORT or ray://HOST:PORT, or when it wants another token.

    `ray.init` would try for 20 s to 2 minutes, and say nothing of tokens. With TLS only `ray.init` itself can tell.
    """
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        address = os.environ["RAY_ADDRESS"]
    if address == "auto" or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    token = _given_token()
    headers = () if token is None else (("authorization", f"Bearer {token}"),)
    server, question = address.removeprefix("ray://"), _CLIENT_S if address.startswith("ray://") else _RAY_S
    with grpc.insecure_channel(server, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(question)(b"", timeout=_ANSWER_TIMEOUT_S, metadata=headers)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise BadInput(f"--address: {TOKEN_NEEDED.format(address)}") from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise BadInput(
                    f"--address: what listens at {address!r} is no Ray to join; is it the port of its dashboard?"
                ) from error
            logger.debug("an answer that is no refusal: %s", error)


def _given_token() -> str | None:
    """Return the token that Ray would send, None where it would send none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None
