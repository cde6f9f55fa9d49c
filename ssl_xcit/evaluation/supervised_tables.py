"""Texts of the supervised evaluation: the table of published models, one result, many results."""

import torch

from ssl_xcit.checkpoints.zoo import zoo
from ssl_xcit.models.flops import count_operations, count_parameters
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import build_xcit


def compare_zoo() -> dict:
    """Parameters and FLOPs of our own networks beside those of every published model.

    "models" has a row for each, "equal" says in how many of them both are the published integers.
    """
    with torch.device("meta"):
        networks = {arch: build_xcit(arch) for arch in ARCHITECTURES}
    rows = []
    for row in zoo().values():
        network, side = networks[row.arch], row.image_size
        params, flops = count_parameters(network), count_operations(network, side, side).total
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
    return {"models": rows, "equal": sum(row["equal"] for row in rows)}


def zoo_text(table: dict) -> str:
    """The result of `compare_zoo` as a table."""
    lines = [
        f"{'':47}{'parameters':>25}  {'FLOPs (multiply-adds), 10^6':>27}  {'published %':>15}",
        f"{'model':47}{'ours':>12} {'published':>12}  {'ours':>13} {'published':>13}  "
        f"{'top-1':>7} {'top-5':>7}",
    ]
    for row in table["models"]:
        flops = [f"{row[key] / 1e6:>13,.3f}" for key in ("flops", "published_flops")]
        lines.append(
            f"{row['model']:47}{row['params']:>12,} {row['published_params']:>12,}  "
            f"{' '.join(flops)}  {row['top1']:>7.2f} {row['top5']:>7.2f}"
            + ("" if row["equal"] else "  DIFFERENT")
        )
    count = len(table["models"])
    lines.append(
        f"parameters and FLOPs equal to the published integers: {table['equal']} of {count}"
    )
    return "\n".join(lines)


def result_text(result: dict) -> str:
    """One evaluation as a table."""
    view = result["preprocess"]
    shape = f"central {view['crop']} of short side" if view["crop"] else "square of side"
    name = result["model"] or "no published model"
    lines = [
        f"{name}: {result['arch']}, {result['role']} of {result['checkpoint']}",
        f"{result['images']:,} images, {view['name']} ({shape} {view['resize']}, "
        f"{view['interpolation']}), {result['precision']}",
    ]
    for key, title in (("top1", "top-1"), ("top5", "top-5")):
        low, high = result[f"{key}_interval"]
        line = f"{title} {result[key]:6.2f} %  (95 % Wilson interval {low:.2f} to {high:.2f})"
        if result["published"]:
            line += (
                f"  published {result['published'][key]:.2f}, difference "
                f"{result['difference'][key]:+.2f}"
            )
        lines.append(line)
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result["warnings"])])


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
