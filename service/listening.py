"""The end of listening, so that nobody who was let in by the system is lost.

The system completes connections by itself and keeps them until they are taken. Who was let in between the last look
and the close would be cut off in the middle of a request, so first the system has to stop letting in: a filter on the
socket (SO_ATTACH_FILTER of socket(7), in the classic language of Linux's networking/filter.rst) drops the packets that
ask for a connection, and passes those that complete one. Whoever asks then asks again after a second, and is refused.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from contextlib import suppress

_SO_ATTACH_FILTER = 26

_SYN, _SYN_OR_ACK, _FLAGS_AT = 0x02, 0x12, 13
"""Of a TCP header (RFC 9293, section 3.1)."""

_NO_REQUESTS = (  # code, jump if true, jump if false, operand
    (0x30, 0, 0, _FLAGS_AT),  # load the byte
    (0x54, 0, 0, _SYN_OR_ACK),  # and
    (0x15, 0, 1, _SYN),  # if it is SYN alone, go on, else leave one out
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # pass
)


def let_nobody_in(listening: socket.socket) -> None:
    """From now on no connection is added to those that wait to be taken; in no process that has this socket.

    Where the system has no such filter, nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_REQUESTS))
    with suppress(OSError):
        listening.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_NO_REQUESTS), ctypes.addressof(program))
        )
