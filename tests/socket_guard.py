"""A guard for subprocesses: whoever connects, sends, listens or resolves a name fails, and it is written down.

Sockets on this machine (AF_UNIX) pass, and so does an address of the machine's own that is bound: urllib3 looks in this
way, when it is imported, whether there is IPv6. The guard sits in `sitecustomize`, so that every Python process below
the first one has it, too; Python's audit events see all that goes through its socket module.
"""

from __future__ import annotations

from pathlib import Path

SITE = """
import os
import sys

USES = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
LOCAL = 1  # AF_UNIX


def note(name, text):
    line = f"{os.getpid()} {text} {sys.orig_argv}\\n"
    handle = os.open(os.path.join(os.environ["SOCKET_GUARD"], name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line.encode())
    os.close(handle)


def guard(event, args):
    if event in USES:
        if args[0].family == LOCAL or (event == "socket.bind" and args[1][0] in ("::1", "127.0.0.1")):
            return
    elif event not in NAMES:
        return
    note("opened", f"{event} {args[1:]}")
    raise PermissionError(f"socket guard: {event} {args[1:]}")


note("guarded", "starts")
sys.addaudithook(guard)
"""


class SocketGuard:
    """Where guarded processes report to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "site").mkdir(parents=True)
        (folder / "site" / "sitecustomize.py").write_text(SITE)

    @property
    def environment(self) -> dict[str, str]:
        """Return what a guarded process needs in its environment."""
        return {"PYTHONPATH": str(self.folder / "site"), "SOCKET_GUARD": str(self.folder)}

    def opened(self) -> list[str]:
        """Return a line for every attempt to use a socket."""
        return self._lines("opened")

    def guarded(self) -> list[str]:
        """Return a line for every process that ran under the guard."""
        return self._lines("guarded")

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []
