"""Cost of a training step as a function of resolution, local crops, prototypes and ranks.

    python benchmarks/scaling.py [--case nano_12_p16] [--precision bf16] [--steps 3] [--threads 2]

Each line comes from its own process, which runs our real steps as in train_step.py. It shows the
minimum CPU and wall seconds of a step, the peak memory of the process, and both relative to the
first line of the table. XCA is linear in the number of tokens, and so is the whole step if the
tokens dominate its cost. Ranks share the threads, and each has the full batch, as on a cluster.
"""

import argparse
import os
import socket

from train_step import CASES, OURS, Case, Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="nano_12_p16", choices=CASES)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    case = CASES[args.case]
    patch_size = int(case.arch.rpartition("_p")[2])
    print(
        f"{case.arch}, {args.precision}, batch {case.batch} per rank, {args.threads} threads in all"
    )
    points = []
    for side in (96, 160, 224, 320, 448):
        point = case._replace(sides=(side, 96), local_crops=0, batch=max(1, case.batch // 4))
        tokens = 2 * point.batch * (side // patch_size) ** 2
        points.append((f"2 x {side} px, no local crops, batch {point.batch}", point, tokens))
    table(args, "global crops (last column: tokens)", points)
    points = []
    for crops in (0, 2, 4, 8, 10):
        point = case._replace(local_crops=crops)
        grids = [(2, case.sides[0]), (crops, case.sides[1])]
        tokens = case.batch * sum(v * (side // patch_size) ** 2 for v, side in grids)
        points.append((f"2 + {crops} crops", point, tokens))
    table(args, "local crops (last column: tokens)", points)
    points = []
    for out_dim in (4096, 16384, 65536, 262144):
        points.append((f"out_dim {out_dim:,}", case._replace(out_dim=out_dim), out_dim))
    table(args, "prototypes", points)
    table(args, "ranks", [(f"{n} ranks", case, n) for n in (1, 2)], ranks=True)


def table(
    args: argparse.Namespace, title: str, points: list[tuple[str, Case, int]], ranks: bool = False
) -> None:
    """Measure the points and print the table."""
    print(f"\n{title}\n{'':44}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}{'CPU':>7}{'memory':>8}")
    base = None
    for name, case, size in points:
        cpu, wall, peak = measure(args, case, size if ranks else 1)
        base = base or (cpu, peak, size)
        print(
            f"{name:44}{cpu:8.3f}{wall:8.3f}{peak / 1e6:9.0f}{cpu / base[0]:7.2f}"
            f"{peak / base[1]:8.2f}{size / base[2]:8.2f}",
            flush=True,
        )


def measure(args: argparse.Namespace, case: Case, ranks: int) -> tuple[float, float, int]:
    """Return (CPU seconds of all ranks, wall seconds, peak memory of a rank) of a step."""
    program = f"ours {args.precision}"
    assert program in OURS
    environment = {"OMP_NUM_THREADS": str(max(1, args.threads // ranks))}
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    servers = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        servers.append(Server(program, case, environment | place))
    steps = []
    for _ in range(2 + args.steps):  # the first answer describes the program, the second is warm-up
        for server in servers:
            server.ask()
        steps.append([server.answer() for server in servers])
    for server in servers:
        server.close()
    counted = steps[2:]
    return (
        min(sum(rank["cpu"] for rank in step) for step in counted),
        min(max(rank["wall"] for rank in step) for step in counted),
        max(rank["peak"] for rank in counted[-1]),
    )


if __name__ == "__main__":
    main()
