"""An S3 server on this machine for tests: SeaweedFS, where its binary `weed` is installed."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_REGION": "us-east-1"}

READY = "All enabled components are running"
"""What the server says when its bucket is there."""


def weed() -> str | None:
    """The binary, on the PATH or beside this Python."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


class Server:
    """A store with one bucket, `runs`, that can be killed and started again with what it had."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, free_ports(4)
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports[0]}"}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        s3, master, volume, filer = self.ports
        flags = [
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={s3}", f"-master.port={master}"),
            *(f"-volume.port={volume}", f"-filer.port={filer}"),
        ]
        binary = weed()
        assert binary is not None
        self.folder.mkdir(exist_ok=True)
        command = [binary, "-logtostderr", "mini", f"-dir={self.folder}", "-bucket=runs", *flags]
        before = self.log().count(READY)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while self.log().count(READY) == before:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the store did not start: {self.log()[-2000:]}")
            time.sleep(0.05)

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_ports(count: int) -> list[int]:
    """Free ports of which the one ten thousand above, which the server takes for its own calls, is free as well.

    None of them is one that the system gives to connections of others.
    """
    candidates = random.Random(os.getpid()).sample(range(12_000, 22_000), 200)
    return [port for port in candidates if is_free(port) and is_free(port + 10_000)][:count]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
