"""An S3 server on this machine for tests: SeaweedFS, where its binary `weed` is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_REGION": "us-east-1"}


def weed() -> str | None:
    """The binary, on the PATH or beside this Python."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


class Server:
    """A store with one bucket, `runs`, that can be killed and started again with what it had."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, free_ports(5)
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports[0]}"}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        s3, master, volume, filer, filer_grpc = self.ports
        flags = [
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={s3}", f"-master.port={master}"),
            *(f"-volume.port={volume}", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"),
        ]
        binary = weed()
        assert binary is not None
        self.folder.mkdir(exist_ok=True)
        command = [binary, "-logtostderr", "mini", f"-dir={self.folder}", "-bucket=runs", *flags]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log)
        self.until_ready()

    def until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.environment["AWS_ENDPOINT_URL"] + "/runs", timeout=2)
            except urllib.error.HTTPError as error:
                if error.code == 403:  # it is there and wants keys
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"the store did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_ports(count: int) -> list[int]:
    """Ports whose number plus ten thousand, which the server takes for its own calls, is a port as well."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port < 55_000 and port not in ports:
            ports.append(port)
    return ports
