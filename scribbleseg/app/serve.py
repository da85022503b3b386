"""`scribbleseg app`: opens the folder, loads the checkpoint, and serves until it is stopped."""

import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from scribbleseg.app.folder import Folder
from scribbleseg.app.hosts import bracketed, host_headers, is_loopback, read_token
from scribbleseg.app.models import Model, load_model
from scribbleseg.app.refusal import Refusal
from scribbleseg.app.remote import load_remote
from scribbleseg.app.studio import Place, Studio
from scribbleseg.device import num_threads, prepare_cpu
from scribbleseg.errors import InputError


def serve(
    checkpoint: str | None,
    data: Path,
    *,
    server: str | None,
    compare: str | None,
    split: str,
    host: str,
    port: int,
    browse: bool,
    say: Callable[[str], None],
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        checkpoint: What makes the masks; see `scribbleseg.load`.
        data: Folder that is drawn into; made if missing.
        server: URL of a deployed predictor that makes them instead.
        compare: Another checkpoint, shown beside it.
        split: Its split.
        host: Address to listen on; beyond loopback, $SCRIBBLESEG_TOKEN or a new token is asked for.
        port: Port to listen on; 0 takes a free one.
        browse: Open the page in the person's browser.
        say: Tells the address.

    Raises:
        InputError: a checkpoint, the folder or the address cannot be used, or the extra is missing.
    """
    try:
        import uvicorn

        from scribbleseg.app.server import create_app
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; install it: pip install '.[app]'"
        ) from None
    models: dict[Place, Model] = {"main": _load(checkpoint, server)}
    if compare is not None:
        models["other"] = load_model(compare)
    folder = Folder(root=data, split=split)
    try:
        folder.make()
        hidden = folder.hidden()
    except Refusal as refusal:
        raise InputError(f"--data: {refusal}") from None
    # The browser wants a core of its own, and threads that wait for one another are late together.
    prepare_cpu(max(1, num_threads() - 1))
    studio = Studio(folder, models)
    listener = listen(host, port)
    port = listener.getsockname()[1]
    local = is_loopback(host)
    token = None if local else read_token() or secrets.token_urlsafe(24)
    hosts = host_headers(host, port) if local else []
    address = f"http://{bracketed(host)}:{port}/"
    address += f"?token={quote(token, safe='')}" if token else ""
    if hidden:
        say(
            f"{len(hidden)} photograph(s) of {data / split / 'images'} are not shown, such as "
            f"{hidden[0]!r}: not every disk takes such a name; rename them"
        )
    say(f"drawing into {data / split}; stop with Ctrl-C")
    say(address)
    if browse and _has_screen():
        webbrowser.open(address)
    idle = threading.Thread(target=studio.score_when_idle, name="proposals", daemon=True)
    idle.start()
    config = uvicorn.Config(
        create_app(studio, hosts=hosts, token=token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        studio.close()


def _load(checkpoint: str | None, server: str | None) -> Model:
    """Return what makes the masks, on this machine or on another one."""
    match checkpoint, server:
        case str(), None:
            return load_model(checkpoint)
        case None, str():
            return load_remote(server, read_token())
        case _:
            given = "neither" if checkpoint is None else "both"
            raise InputError(
                f"--checkpoint and --server: found {given}, expected one of them, such as "
                "--checkpoint released:best"
            )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address of this machine.

    Raises:
        InputError: no such address, or the port is taken.
    """
    if not host:
        # Python would listen on every address, and nobody has asked for that.
        raise InputError("--host is empty; expected an address of this machine, such as 127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port}: {error}; expected an address of this machine and a free "
            "port (0 finds one)"
        ) from None


def _has_screen() -> bool:
    """Return whether a browser would open in a window; without one, it would take the terminal."""
    windowed = sys.platform in ("darwin", "win32")
    return windowed or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
