"""Prefect's server for one run: `python -P server_process.py FD`, on a listening socket.

It prints the line `ready`, and exits when its standard input ends: when the run closes it or is
killed, so no server is ever left running. It ignores signals: one that goes to the whole process
group (Ctrl-C, Slurm, systemd) must not end the server before the end of the run is recorded.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading

_POLL_S = 0.1
_FINISH_S = 4.0  # for requests in progress


def main(fd: int) -> int:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    # In a thread, since in the main one uvicorn would install its own signal handlers.
    serving = threading.Thread(
        target=server.run, kwargs={"sockets": [socket.socket(fileno=fd)]}, daemon=True
    )
    serving.start()
    is_ready = False
    while serving.is_alive():
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        # Nothing is written to the pipe: it ends with the run.
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
        if server.started and not is_ready:
            is_ready = True
            print("ready", flush=True)
    server.should_exit = True
    serving.join(_FINISH_S)
    sys.stderr.flush()
    # Without waiting for any other thread of the server.
    os._exit(0 if is_ready else 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
