"""A network of hosts on one machine: a namespace each, joined by a switch in user space that delays, loses and cuts.

The switch reads frames from the hosts' veth ends and hands them on as `rules.json` says, so a test needs no kernel module for
it (netem is missing on many machines). Everything is made and removed by `Fabric`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

NETWORK = "10.231.7"
SWITCH = "switch"
ALL = 0x0003  # ETH_P_ALL


class Fabric:
    """Hosts by name, in order: the first has address .1. Use as a context manager.

    Raises (on entry):
        OSError: this user may not make namespaces or links here.
    """

    def __init__(self, folder: Path, hosts: list[str]) -> None:
        self._rules = folder / "rules.json"
        self._tag = f"hansa{os.getpid() % 100000}"
        self.hosts = hosts
        self._switch: subprocess.Popen[bytes] | None = None

    def namespace(self, host: str) -> str:
        return f"{self._tag}-{SWITCH if host == SWITCH else self.hosts.index(host)}"

    def inside(self, host: str) -> list[str]:
        """What to put before a command to run it on that host."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def address(self, host: str) -> str:
        return f"{NETWORK}.{self.hosts.index(host) + 1}"

    def rules(self, *, delay_s: float = 0.0, loss: float = 0.0, cut: tuple[str, ...] = ()) -> None:
        """From now on: each frame takes so long, so many are lost, and nothing reaches or leaves the cut hosts."""
        ends = [self.hosts.index(host) for host in cut]
        new = self._rules.with_suffix(".new")
        new.write_text(json.dumps({"delay_s": delay_s, "loss": loss, "cut": ends}))
        new.replace(self._rules)
        time.sleep(0.2)

    def __enter__(self) -> Fabric:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _make(self) -> None:
        for host in [SWITCH, *self.hosts]:
            _ip("netns", "add", self.namespace(host))
            _ip("-n", self.namespace(host), "link", "set", "lo", "up")
        for number, host in enumerate(self.hosts):
            near, far = f"e{number}", f"s{number}"
            _ip(
                "-n",
                self.namespace(SWITCH),
                "link",
                "add",
                far,
                "type",
                "veth",
                "peer",
                "name",
                near,
                "netns",
                self.namespace(host),
            )
            _ip("-n", self.namespace(host), "addr", "add", f"{self.address(host)}/24", "dev", near)
            for place, link in ((host, near), (SWITCH, far)):
                _ip("-n", self.namespace(place), "link", "set", link, "up")
                _run([*self.inside(place), sys.executable, __file__, "plain", link])
        self.rules()
        self._switch = subprocess.Popen(
            [*self.inside(SWITCH), sys.executable, __file__, "switch", str(len(self.hosts)), str(self._rules)]
        )

    def _remove(self) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
        for host in [SWITCH, *self.hosts]:
            with contextlib.suppress(OSError):
                _ip("netns", "del", self.namespace(host))


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as err:
        raise OSError(f"{command[0]} is not installed") from err
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def plain(link: str) -> None:
    """Frames as they are on a wire: no segments larger than the MTU, no checksums left to hardware that is not there."""
    offload = {"tso": 0x1F, "ufo": 0x22, "gso": 0x24, "gro": 0x2C, "txcsum": 0x17, "rxcsum": 0x15, "sg": 0x19}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in offload.values():
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP16x", link.encode(), ctypes.addressof(value))
            with contextlib.suppress(OSError):  # one that this link has not
                fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL


def switch(ends: int, rules: Path) -> None:
    """Hand frames on for ever."""
    sockets = []
    for number in range(ends):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
        end.bind((f"s{number}", 0))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        end.setblocking(False)
        sockets.append(end)
    known: dict[bytes, int] = {}
    waiting: list[tuple[float, int, int, bytes]] = []
    law, read_at, count = json.loads(rules.read_text()), 0.0, 0
    while True:
        now = time.monotonic()
        if now > read_at + 0.05:
            law, read_at = json.loads(rules.read_text()), now
        while waiting and waiting[0][0] <= now:
            _, _, to, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                sockets[to].send(frame)
        patience = max(0.0, min(0.05, waiting[0][0] - now)) if waiting else 0.05
        for ready in select.select(sockets, [], [], patience)[0]:
            source = sockets.index(ready)
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    frame, about = ready.recvfrom(65536)
                    if about[2] == 4:  # PACKET_OUTGOING: what this switch sent itself
                        continue
                    known[frame[6:12]] = source
                    aims = [known[frame[:6]]] if frame[:6] in known else [n for n in range(ends) if n != source]
                    for to in aims:
                        lost = to == source or {source, to} & set(law["cut"]) or random.random() < law["loss"]
                        if not lost:
                            count += 1
                            heapq.heappush(waiting, (time.monotonic() + law["delay_s"], count, to, frame))


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        plain(sys.argv[2])
    else:
        switch(int(sys.argv[2]), Path(sys.argv[3]))
