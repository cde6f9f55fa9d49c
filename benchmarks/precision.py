"""Images/s of a training step in each precision, and whether `auto` selects the fastest.

    python benchmarks/precision.py [--case nano_32] [--rounds 5] [--device cpu]

To emulate a CPU without bfloat16 on an x86 processor that has it:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/precision.py
"""

import argparse
import statistics

from train_step import CASES, Server

NAMES = ("bf16", "fp16", "fp32")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="nano_32", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    case, options = CASES[args.case], ("--device", args.device)
    servers = {name: Server(f"ours {name}", case, {}, options) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for server in servers.values():
        server.step()  # builds the program; the first answer describes it
        server.step()  # warm-up
    for _ in range(args.rounds):
        for name, server in servers.items():
            seconds[name].append(server.step()["wall"])
    for server in servers.values():
        server.close()
    import torch

    from ssl_xcit.runtime.precision import quickest

    rates = {name: case.batch / statistics.median(times) for name, times in seconds.items()}
    chosen = quickest(torch.device(args.device))
    print(f"{case.arch}, batch {case.batch}, {args.device}, {args.rounds} rounds")
    for name, rate in rates.items():
        print(f"{name}{rate:10.1f} images/s" + ("   auto" if name == chosen.name else ""))
    best = max(rates, key=rates.get)
    print(f"auto selects {chosen.name} ({chosen.reason}); the fastest was {best}")


if __name__ == "__main__":
    main()
