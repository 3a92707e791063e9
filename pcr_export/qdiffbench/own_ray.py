"""How Ray of our own is started: on loopback alone, with a token of its own, in a folder that no other user can enter."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError

LOOPBACK = "127.0.0.1"
LONGEST_TEMPORARY = 28  # letters: Linux takes 107 for the path of a socket, and Ray adds up to 77 to its folder's


@contextmanager
def own_ray(ray: Any) -> Iterator[Mapping[str, Any]]:
    """Arguments for `ray.init` by which no other machine and no other user of this one can reach what it starts.

    Enter it before `ray.init`, leave it after `ray.shutdown`. Ray's processes are handed the token by their environment; the object
    store is memory without a name, opened through a socket in the folder.

    Args:
        ray: the module, not started.
    """
    with ExitStack() as stack:
        home = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ray-", dir=_short_folder(), ignore_cleanup_errors=True)
        )
        stack.callback(_forget_token, ray)  # after the environment is as it was
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        stack.enter_context(_replaced(os.environ, token))
        _forget_token(ray)
        # What Ray does by itself on macOS and Windows; elsewhere it takes 127.0.0.1 for a mistake.
        stack.enter_context(_replaced(vars(ray._private.ray_constants), {"ENABLE_RAY_CLUSTER": False}))
        # Ray opens its folder to everybody: it gets one inside of ours.
        yield {"_node_ip_address": LOOPBACK, "_temp_dir": str(Path(home) / "r"), "include_dashboard": False}


def check_loopback(ray: Any, context: Any) -> None:
    """Raise PcrExportError where what `ray.init` started, and returned as `context`, can be reached from elsewhere."""
    host = context.address_info["node_ip_address"]
    if host != LOOPBACK or ray._raylet.get_authentication_mode() != ray._raylet.AuthenticationMode.TOKEN:
        raise PcrExportError(
            f"Ray {ray.__version__} can be reached from elsewhere ({host}): use --workers 1, or an older Ray"
        )


def _forget_token(ray: Any) -> None:
    """Have Ray read the environment again: it keeps what it once read of token and mode."""
    ray._raylet.Config.initialize("")  # first: a thread that is still there reads the token as the mode has it
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_TEMPORARY else "/tmp"


@contextmanager
def _replaced(mapping: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """`values` in `mapping` inside, what was there outside."""
    before = {name: mapping[name] for name in values if name in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del mapping[name]
        mapping.update(before)
