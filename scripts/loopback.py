"""Where processes of one machine meet, for what starts them itself."""

import socket

from torch.distributed import TCPStore


def loopback_store(workers: int) -> tuple[TCPStore, int]:
    """A store that `workers` processes of this machine reach at 127.0.0.1, and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    # a socket that is bound already keeps the store off the other interfaces
    store = TCPStore(
        "127.0.0.1", port, workers, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port
