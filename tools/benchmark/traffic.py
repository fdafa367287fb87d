"""What one process sends over the network, as the operating system counts it."""

import os
import socket
import stat
import struct
from pathlib import Path

BYTES_ACKED = 120  # offset in Linux' struct tcp_info: payload that the other side has confirmed


def bytes_sent() -> int:
    """Payload bytes that this process has sent over its open TCP connections, without headers (Linux)."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            number = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
                total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
        except (OSError, struct.error):
            continue  # closed meanwhile, or not a connection
    return total
