"""The program that runs JAX's coordination service, in a process of its own (see `peers`).

Were it in the first process, as JAX has it, the end of that process would abort all others before
they can say why. It starts with one line of JSON, answers with one, and ends when it is told to,
or, once the first process is gone, when no other is connected any more. It imports nothing of
mpjax, whose start takes longer.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

_LONGEST = 60.0  # seconds that it outlives the first process
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_ESTABLISHED = "01"


def in_use(port: int) -> bool:
    """Whether something listens on a port; gRPC itself would share it with an older service."""
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def connections(port: int) -> int | None:
    """How many are connected to a port of this machine; None where it cannot be told."""
    try:
        rows = [row.split() for table in _TABLES for row in Path(table).read_text().splitlines()]
    except OSError:
        return None
    local = [f[1] for f in rows if len(f) > 3 and f[3] == _ESTABLISHED]
    return sum(place.endswith(f":{port:04X}") for place in local)


def serve(address: str, count: int, settings: dict[str, object]) -> None:
    """Runs the service until it is to end."""
    from jaxlib import _jax

    port = int(address.rsplit(":", 1)[1])
    if in_use(port):
        raise OSError(f"port {port} is in use; give another, or wait for the run that has it")
    service = _jax.get_distributed_runtime_service(address, count, **settings)
    print(json.dumps({"up": os.getpid()}), flush=True)
    if sys.stdin.readline().strip() == "shutdown":
        service.shutdown()
        return
    begun = time.monotonic()
    while time.monotonic() - begun < _LONGEST and connections(port) != 0:
        time.sleep(0.5)
    os._exit(0)  # a service with clients would wait for them


def main() -> None:
    """Reads what to serve, and serves it."""
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    try:
        serve(start["address"], start["count"], start["settings"])
    except Exception as error:  # of jaxlib's own kinds
        print(json.dumps({"error": str(error)[:500]}), flush=True)


if __name__ == "__main__":
    main()
