"""What it costs nodes to protect each other, and how fast a lost image comes back; against bare sockets and bare gRPC.

    python benchmarks/protect.py [--size 256MB] [--rounds 5] [--agents 4,8,16] [--quick]

Agents are real processes on loopback addresses; a trainer is played by this process, which only fills slots and says so.
Everything shares this machine's cores, so the figures to read are ratios within one round, and CPU seconds. The limit is one
blocking socket, ``sendall`` to ``recv_into``, between two processes.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cluster import Cluster
from holdfast.tests.simulation.scale import GROUP_NODES, PROTECT, control_load

_CHUNK: int = 4 << 20
_GRPC_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of each image, in MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agents", default="4,8,16,32", help="how many, for the control plane")
    parser.add_argument("--quick", action="store_true", help="small, two rounds")
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        _play(*options.role)
        return
    nbytes = (64 if options.quick else options.size) * 10**6
    rounds = 2 if options.quick else options.rounds
    agents = [4, 8] if options.quick else [int(text) for text in options.agents.split(",")]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; images of {nbytes / 1e6:.0f} MB, {rounds} rounds")
    _throughput(nbytes, rounds)
    _control(agents)
    _simulated([16, 64] if options.quick else [16, 32, 64, 128, 256, 512, 1024])


def _throughput(nbytes: int, rounds: int) -> None:
    """Protecting and rebuilding, in turn with the limits."""
    found: dict[str, list[float]] = {}

    def note(**figures: float) -> None:
        for name, figure in figures.items():
            found.setdefault(name, []).append(figure)

    with Cluster(2, "1+1", nbytes) as pair, Cluster(4, "3+1", nbytes) as four:
        for cluster in (pair, four):
            for _ in range(2):  # the first of each cell pays for connections
                cluster.protect()
            cluster.rebuild()
        for _ in range(rounds):
            note(socket=_pair("socket", nbytes), grpc=_pair("grpc", nbytes))
            for name, cluster, k in (("mirror", pair, 1), ("3+1", four, 3)):
                done = cluster.protect()
                note(**{name: done.nbytes / done.seconds, f"{name} cpu": done.cpu_s / (done.nbytes / 1e9)})
                note(**{f"rebuild {name}": k * nbytes / cluster.rebuild()})  # k bytes are pulled for each
    limit = statistics.median(found["socket"])
    print(
        f"\none blocking socket {limit / 1e9:.2f} GB/s; gRPC stream of raw bytes {_of(found, 'grpc', 'socket')} of it"
    )
    print("bytes pulled per second; protecting, all nodes of a group pull at once, and share these cores\n")
    for name in ("mirror", "3+1"):
        cpu = statistics.median(found[f"{name} cpu"])
        for what, target in ((name, 0.5), (f"rebuild {name}", 0.5)):
            share = _ratio(found, what, "socket")
            verdict = "ok" if share >= target else "MISSED"
            rate = statistics.median(found[what]) / 1e9
            print(f"{what:<16} {rate:6.2f} GB/s  {share:5.0%} of the socket  >= {target:.0%}  {verdict}")
        print(
            f"{'':<16} {cpu:6.2f} CPU s/GB, both ends, checksums and arithmetic  <= 0.60  {'ok' if cpu <= 0.6 else 'MISSED'}"
        )


def _ratio(found: dict[str, list[float]], what: str, limit: str) -> float:
    return statistics.median(a / b for a, b in zip(found[what], found[limit], strict=True))


def _of(found: dict[str, list[float]], what: str, limit: str) -> str:
    return f"{_ratio(found, what, limit):.0%}"


def _control(counts: Sequence[int]) -> None:
    """Calls and bytes per node and snapshot; they must not grow with the number of nodes."""
    print("\ncontrol plane, groups of four (3+1), images of 64 kB: per node and snapshot")
    for count in counts:
        with Cluster(count, "3+1", 65_536) as cluster:
            cluster.protect()
            before = cluster.calls()
            for _ in range(3):
                cluster.protect()
            calls, nbytes = (after - was for after, was in zip(cluster.calls(), before, strict=True))
            print(f"{count:3d} agents  {calls / count / 3:6.1f} calls  {nbytes / count / 3:8.0f} bytes")


def _simulated(counts: Sequence[int]) -> None:
    """The same for more agents than one machine runs: the real protocol, in the simulator's time and network."""
    print(f"\ncontrol plane in the simulator, groups of {GROUP_NODES} ({PROTECT}): per node and snapshot")
    for count in counts:
        load = control_load(count)
        said = sum(load.messages.values()) - load.calls
        print(
            f"{count:4d} agents  {load.calls:6.1f} calls  {load.call_bytes:8.0f} bytes  {said:4.1f} words with the trainer"
        )


# -- the limits --------------------------------------------------------------------------------------------------------


def _pair(kind: str, nbytes: int) -> float:
    """Bytes per second from one process to another."""
    command = [sys.executable, str(Path(__file__)), "--role", f"send-{kind}", str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        port = int(sender.stdout.readline())
        return nbytes / (_receive_socket(port, nbytes) if kind == "socket" else _receive_grpc(port, nbytes))


def _play(role: str, nbytes: str) -> None:
    source = np.ones(int(nbytes), np.uint8)
    if role == "send-socket":
        with socket.create_server(("127.0.0.1", 0)) as server:
            print(server.getsockname()[1], flush=True)
            taken, _ = server.accept()
            with taken:
                for start in range(0, len(source), _CHUNK):
                    taken.sendall(source[start : start + _CHUNK].data)
        return
    chunks = [source[start : start + _CHUNK].tobytes() for start in range(0, len(source), _CHUNK)]
    with _grpc_server(lambda _request, _context: iter(chunks)) as port:
        print(port, flush=True)
        sys.stdin.read()


@contextmanager
def _grpc_server(stream: Callable[[Any, Any], Iterator[bytes]]) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2), options=_GRPC_OPTIONS)
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Pull": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0)


def _receive_socket(port: int, nbytes: int) -> float:
    target = np.ones(nbytes, np.uint8)  # resident, as a slot is
    with socket.create_connection(("127.0.0.1", port)) as sock:
        began_s, done = time.perf_counter(), 0
        while done < nbytes:
            done += sock.recv_into(target[done : done + _CHUNK].data)
        return time.perf_counter() - began_s


def _receive_grpc(port: int, nbytes: int) -> float:
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options=_GRPC_OPTIONS))
        grpc.channel_ready_future(channel).result(30.0)
        began_s, done = time.perf_counter(), 0
        pull: grpc.UnaryStreamMultiCallable[Any, bytes] = channel.unary_stream("/bench/Pull")
        for chunk in pull(b""):
            done += len(chunk)
        assert done == nbytes
        return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
