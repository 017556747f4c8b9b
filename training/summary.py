"""summary.json of a run, and what the screen shows of it."""

import json
from pathlib import Path

from data import Domains
from training.device import get_device
from training.evaluation import choose
from training.stream import describe_stream


def iou_table(target: dict[str, dict]) -> str:
    """The IoU of each class, one column per figure of the target; `-` for a class without label."""
    classes = list(target["last"]["iou"])
    width = max(map(len, classes))
    lines = [f"{'IoU':{width}}" + "".join(f"{name:>10}" for name in target)]
    for name in classes:
        values = (entry["iou"][name] for entry in target.values())
        cells = ("-" if value is None else f"{value:.1f}" for value in values)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def to_json(summary: dict) -> str:
    """The text of summary.json, in which a row of a confusion matrix is one line."""
    others = {name: value for name, value in summary.items() if name != "confusion"}
    matrices = []
    for name, matrix in summary["confusion"].items():
        rows = matrix and ",\n      ".join(map(json.dumps, matrix))
        text = f"[\n      {rows}\n    ]" if matrix else "null"
        matrices.append(f"    {json.dumps(name)}: {text}")
    confusion = ",\n".join(matrices)
    return f'{json.dumps(others, indent=2)[:-2]},\n  "confusion": {{\n{confusion}\n  }}\n}}\n'


def _matrix(entry: dict) -> list[list[int]] | None:
    """The confusion matrix of an evaluation as rows; None without labels.

    A run that an earlier version has begun has none of its evaluations until then.
    """
    confusion = entry.get("confusion")
    return None if confusion is None else confusion.tolist()


def summarize(run, domains: Domains, facts: dict) -> dict:
    """What summary.json contains.

    Args:
        run: a `Run` whose last evaluation is over.
        domains: its data.
        facts: what the method adds.
    """
    config, device = run.config, get_device(run.config.device)
    target = choose(run.history, config.select)
    step = target["selected"]["step"]
    selected = next(e for e in run.history if e["step"] == step)
    labeled, commit = domains.target_labeled, run.commits[0]
    if len(run.commits) > 1:  # resumed by other code
        commit = ", ".join(map(str, run.commits))
    return {
        "method": type(config).method,
        "seed": config.seed,
        "steps": run.history[-1]["step"],
        "device": device.type,
        "machine": "; ".join(run.machines),
        "commit": commit,
        "seconds": round(run.total_seconds(), 1),
        "parameters": sum(x.numel() for x in run.state["model"].parameters()),
        "target": target,
        "confusion": {"last": _matrix(run.history[-1]), "selected": _matrix(selected)},
        **({"changed": run.changes} if run.changes else {}),
        **({"target_labeled": len(labeled)} if labeled else {}),
        "target_test": domains.target_test_note,
        "classes": domains.classes,
        **({"absent_classes": absent} if (absent := domains.absent_classes) else {}),
        "collapse_alarms": run.monitor.alarms,
        "collapsed": {
            name: entry["collapsed"]
            for name, entry in (("last", run.history[-1]), ("selected", selected))
            if entry["collapsed"]
        },
        **facts,
        "source_val": run.history[-1]["source_val"],
        "selection": {
            "criterion": config.select,
            "value": selected["criteria"].get(config.select),  # none: the last step
            "source_val": selected["criteria"].get("source_val"),
            "neg_entropy": selected["criteria"].get("neg_entropy"),
            "infomax": selected["criteria"].get("infomax"),
            "source_count": selected["source_count"],
            "source_vetoes": selected["source_vetoes"],
            "part_of_training_loss": config.select in config.trained_criteria(),
        },
    }


def print_summary(summary: dict, file: Path) -> None:
    """Print the target's figures, and first what is wrong with them.

    Args:
        summary: as `summarize` returns it.
        file: where it is stored.
    """
    target = summary["target"]
    if "stream" in summary:
        print(*describe_stream(summary["stream"], summary["collapse_alarms"]), sep="\n")
    for name, reason in summary["collapsed"].items():
        print(f"warning: {name}: the predictions on the target have collapsed: {reason}")
    if start := summary.get("changed_from_start"):
        share = 100 * start["share"]
        print(f"{share:.1f} % of the predictions on the target differ from those of {start['run']}")
    if target["oracle"]["step"] is None:
        step, criterion = target["selected"]["step"], summary["selection"]["criterion"]
        print(f"no target labels to measure with; model.pt: step {step}, by {criterion}")
        print(file)
        return
    for name, entry in target.items():
        values = ((k, v) for k, v in entry.items() if k != "step" and isinstance(v, float))
        figures = "  ".join(f"{k} {v:.2f}" for k, v in values)
        print(f"target {name:8} step {entry['step']}  {figures}")
    if "iou" in target["last"]:
        print(iou_table(target))
    print(f"{file} (target: {summary['target_test']})")
