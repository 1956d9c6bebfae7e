"""Which process listens on a port, as far as this user may know."""

from __future__ import annotations


def port_holder(port: int) -> str:
    """`python3 (pid 4711)`, or `another process` where that is another user's, or in a container."""
    import psutil  # 25 ms, for the rare port that is taken

    try:
        for socket in psutil.net_connections("tcp"):
            if socket.laddr and socket.laddr.port == port and socket.status == psutil.CONN_LISTEN and socket.pid:
                return f"{psutil.Process(socket.pid).name()} (pid {socket.pid})"
    except (psutil.Error, OSError):
        pass
    return "another process"
