"""Ray's token: one of its own for a Ray that this process starts, and a clear word where a Ray wants another."""

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

from neuronal_ray.cli.errors import BadInput

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
    """Raise BadInput when the Ray at HOST:PORT wants a token that is not given; `ray.init` would try for 20 s."""
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        address = os.environ["RAY_ADDRESS"]
    if address == "auto" or address.startswith("ray://"):
        return
    try:
        GcsClient(address=address)
    except AuthenticationError as error:
        raise BadInput(f"--address: {TOKEN_NEEDED.format(address)}") from error
    except (RayError, OSError, RuntimeError) as error:
        raise BadInput(f"--address: no Ray to join at {address!r} ({str(error).splitlines()[0]})") from error
