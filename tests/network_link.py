"""Two ranks in network namespaces of their own, with a link between them that a test cuts.

This needs `ip` of iproute2 and the rights of root.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launch import Job, launcher_variables, script_command

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500  # free, since nothing else runs in the namespaces


class NetworkLink:
    """Two network namespaces with a virtual cable between them."""

    def __init__(self, name: str):
        """Create them. name: a beginning of names that are not in use, of at most 12 characters.

        Raises CalledProcessError without the rights to do so.
        """
        self.namespaces = [f"{name}0", f"{name}1"]
        self.interfaces = [f"{name}v0", f"{name}v1"]
        for namespace in self.namespaces:
            _ip("netns", "add", namespace)
        (first, second), (first_end, second_end) = self.namespaces, self.interfaces
        words = (
            f"link add {first_end} netns {first} type veth peer name {second_end} netns {second}"
        )
        _ip(*words.split())
        for namespace, interface, address in zip(
            self.namespaces, self.interfaces, ADDRESSES, strict=True
        ):
            _ip("-n", namespace, "addr", "add", f"{address}/30", "dev", interface)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", interface, "up")

    def cut(self) -> None:
        """Let no packet pass."""
        _ip("-n", self.namespaces[0], "link", "set", self.interfaces[0], "down")

    def restore(self) -> None:
        """Let packets pass again. Open connections have survived."""
        _ip("-n", self.namespaces[0], "link", "set", self.interfaces[0], "up")

    def remove(self) -> None:
        """Delete the namespaces, and the link with them."""
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


class LinkedJob(Job):
    """Two ranks without torchrun, one on each side of a link; otherwise as `Job`."""

    def __init__(self, out: Path, script: str, arguments: list[str], link: NetworkLink):
        """Start the ranks."""
        self._record(out)
        self.ranks = []
        for rank in range(2):
            command = ["ip", "netns", "exec", link.namespaces[rank]]
            variables = launcher_variables(rank, 2, PORT) | {
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": ADDRESSES[0],
                "GLOO_SOCKET_IFNAME": link.interfaces[rank],
                "OMP_NUM_THREADS": "1",  # as torchrun sets it
            }
            command += script_command(script, arguments)
            self.ranks.append(self._start(command, **variables))
        self.process = self.ranks[0]

    def rank_pids(self) -> list[int]:
        """Return the ids of the ranks' own processes, in order."""
        return [process.pid for process in self.ranks]


@contextlib.contextmanager
def network_link() -> Iterator[NetworkLink | None]:
    """Yield a link for the block; None where this process may not create one."""
    if shutil.which("ip") is None:
        yield None
        return
    name = f"st{os.getpid()}"
    try:
        link = NetworkLink(name)
    except subprocess.CalledProcessError:
        for index in range(2):
            subprocess.run(["ip", "netns", "del", f"{name}{index}"], capture_output=True)
        yield None
        return
    try:
        yield link
    finally:
        link.remove()


def can_link() -> bool:
    """Return whether this process may create a link."""
    with network_link() as link:
        return link is not None


def _ip(*words: str) -> None:
    """Run ip(8). Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True)
