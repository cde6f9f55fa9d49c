"""Training speed next to other busy processes on the same cores.

    python benchmarks/neighbours.py [--case nano_32] [--precision auto] [--rounds 3]

Prints images/s of a step alone, next to one busy process, and next to one per core. The share is
relative to the fair speed: C / (C + B) on C cores next to B busy processes. Each row is a way for
OpenMP's threads to wait for each other, in its own process. The processes take turns, and each turn
begins with a few seconds of warm-up. See ssl_xcit/runtime/neighbours.py.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from train_step import CASES, Server

WAYS = {
    "ours: spin; sleep under contention": {},
    "OpenMP's default: GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="nano_32", choices=CASES)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="measured per turn")
    args = parser.parse_args()
    case, cores = CASES[args.case], len(os.sched_getaffinity(0))
    crowds = {0: "alone", 1: "next to 1", cores: f"next to {cores}"}
    program = f"ours {args.precision}"
    servers = {way: Server(program, case, variables) for way, variables in WAYS.items()}
    for server in servers.values():
        server.step()  # builds the program; the first answer describes it
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for crowd in crowds:
            loop = [sys.executable, "-c", "while True: pass"]
            busy = [subprocess.Popen(loop) for _ in range(crowd)]
            for way, server in servers.items():
                images_per_second(server, case.batch, 3.0)
                rate = images_per_second(server, case.batch, args.seconds)
                rates.setdefault((way, crowd), []).append(rate)
            for process in busy:
                process.kill()
                process.wait()
    for server in servers.values():
        server.close()
    print(f"{case.arch}, {args.precision}, batch {case.batch}, {cores} threads; images/s (share)")
    print(f"{'':44}" + "".join(f"{name:>16}" for name in crowds.values()))
    for way in WAYS:
        cells = []
        for crowd in crowds:
            alone = statistics.median(rates[next(iter(WAYS)), 0])
            rate = statistics.median(rates[way, crowd])
            cells.append(f"{rate:8.1f} ({rate / alone * (cores + crowd) / cores:.2f})")
        print(f"{way:44}" + "".join(f"{cell:>16}" for cell in cells))


def images_per_second(server: Server, batch: int, seconds: float) -> float:
    """Images per second of the steps that begin within `seconds`."""
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        server.step()
        images += batch
    return images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
