"""Tables of the supervised evaluation: the published models, and the results of a folder."""

import torch

from ssl_xcit.checkpoints.zoo import zoo
from ssl_xcit.evaluation.results import Result
from ssl_xcit.models.flops import count_parameters, table_flops
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import build_xcit

COLUMNS = (("model", -47), ("ours", 12), ("published", 13), ("ours", 15), ("published", 14))
COLUMNS += (("top-1", 9), ("top-5", 8))
GROUPS = f"{'':47}{'parameters':>25}  {'FLOPs (multiply-adds), 10^6':>27}  {'published %':>15}"


def compare_zoo() -> Result:
    """Parameters and FLOPs of our own networks beside those of every published model.

    "models" has a row for each, "equal" counts those where both are the published integers.
    """
    with torch.device("meta"):
        networks = {arch: build_xcit(arch) for arch in ARCHITECTURES}
    rows = []
    for row in zoo().values():
        network, side = networks[row.arch], row.image_size
        params, flops = count_parameters(network), table_flops(network, side)
        rows.append(
            {
                "model": row.name,
                "resolution": side,
                "params": params,
                "published_params": row.params,
                "flops": flops,
                "published_flops": row.flops,
                "equal": (params, flops) == (row.params, row.flops),
                "top1": row.top1,
                "top5": row.top5,
                "full_crop_top1": row.full_crop_top1,
                "full_crop_top5": row.full_crop_top5,
                "sha8": row.sha8,
            }
        )
    equal = sum(row["equal"] for row in rows)
    summary = f"parameters and FLOPs equal to the published integers: {equal} of {len(rows)}"
    facts = {"models": rows, "equal": equal}
    return Result(facts, [GROUPS], COLUMNS, [*map(_cells, rows), [summary]])


def _cells(row: dict) -> list[str]:
    return [
        row["model"],
        *(f"{row[key]:,}" for key in ("params", "published_params")),
        *(f"{row[key] / 1e6:,.3f}" for key in ("flops", "published_flops")),
        *(f"{row[key]:.2f}" for key in ("top1", "top5")),
        "" if row["equal"] else "  DIFFERENT",
    ]


def results_markdown(report: dict) -> str:
    """The results of a folder as a Markdown table in the order of the published one."""
    done = [entry for entry in report["files"] if entry["status"] == "done"]
    order = {name: number for number, name in enumerate(zoo())}
    done.sort(key=lambda entry: (order[entry["model"]], entry["file"]))
    settings = report["settings"]
    lines = [
        f"{settings['data']['images']:,} images of {settings['data']['path']}; "
        f"{settings['preprocess']} preprocessing, {settings['precision']}; top-1 and top-5 in %, "
        "with 95 % Wilson intervals",
        "",
        "| model | top-1 | interval | published | difference | top-5 | published | difference | "
        "published file |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in done:
        low, high = entry["top1_interval"]
        published, difference = entry["published"], entry["difference"]
        lines.append(
            f"| {entry['model']} | {entry['top1']:.2f} | {low:.2f} to {high:.2f} | "
            f"{published['top1']:.2f} | {difference['top1']:+.2f} | {entry['top5']:.2f} | "
            f"{published['top5']:.2f} | {difference['top5']:+.2f} | "
            f"{'yes' if entry['published_file'] else 'no'} |"
        )
    others = [entry for entry in report["files"] if entry["status"] != "done"]
    if others:
        lines += ["", "| file | not evaluated, because |", "|---|---|"]
        lines += [f"| {entry['file']} | {entry['reason']} |" for entry in others]
    return "\n".join(lines) + "\n"
