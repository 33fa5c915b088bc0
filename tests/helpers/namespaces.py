"""A second host: a network namespace, and the cable to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest


class Namespace:
    """A network namespace that reaches this one through a pair of interfaces: as good as a second host."""

    def __init__(self) -> None:
        tag = f"{os.getpid() % 0xFFFF:04x}"
        self.name, self._near, self._far = f"mb{tag}", f"mbn{tag}", f"mbf{tag}"
        third = os.getpid() % 250 + 1
        self.host, self.guest = f"10.213.{third}.1", f"10.213.{third}.2"

    def open(self) -> None:
        self._ip("netns", "add", self.name)
        self._ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
        self._ip("addr", "add", f"{self.host}/30", "dev", self._near)
        self._ip("link", "set", self._near, "up")
        for arguments in (["addr", "add", f"{self.guest}/30", "dev", self._far], ["link", "set", self._far, "up"]):
            self._ip("-n", self.name, *arguments)

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    def cut(self) -> None:
        """Pulls the cable: packets are lost, nobody is told."""
        self._ip("-n", self.name, "link", "set", self._far, "down")

    def mend(self) -> None:
        """Plugs it in again."""
        self._ip("-n", self.name, "link", "set", self._far, "up")

    @property
    def prefix(self) -> Sequence[str]:
        """What runs a command there."""
        return ("ip", "netns", "exec", self.name)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def second_host() -> Iterator[Namespace]:
    """Makes one, or skips the test where that cannot be."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and the command ip")
    space = Namespace()
    try:
        space.open()
    except subprocess.CalledProcessError as error:
        space.close()
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    try:
        yield space
    finally:
        space.close()
