"""A finished run on labeled images: figures, tables, pictures, and what they say.

The images are those that the run has held out for its test, or any others: their classes must have
the names of the run's. The model is that of model.pt, the selected step. Everything is written to
RUN/evaluation/ and the name of the set; what is there already is replaced. docs/use.md explains
every file.

    python evaluate.py runs/demo/digits_dann
    python evaluate.py runs/demo/digits_dann --before runs/demo/digits
    python evaluate.py runs/demo/digits_dann --compare runs/demo/digits runs/demo/digits_mcc
    python evaluate.py runs/own/images_pseudo data.target_test.name=folder data.target_test.path=new

RUN              a run folder
key=value        overrides of the run's config: data.*, device, amp
--compare RUN    other runs on the same images: difference, 95 % interval, McNemar's test
--sequences P    with --compare: images in whose names the pattern P matches the same text, such as
                 the frames of a video, are drawn together
--before RUN     a model from before adaptation, whose features are shown beside those of the run;
                 by default its init_from
--out FOLDER     where to write
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from analysis import plots
from analysis.compare import comparison_table, difference, groups_of
from analysis.diagnosis import diagnose
from analysis.examples import write_examples
from analysis.features import domain_features, proxy_a_distance, write_features
from analysis.measure import Predictions, predict
from analysis.run_files import read_metrics, read_summary
from analysis.sets import OpenedRun, open_run
from analysis.tables import (
    against_summary,
    class_table,
    figures_text,
    never_predicted,
    per_class,
    write_csv,
    write_tables,
)
from common.errors import UserError, exit_with
from common.writing import write_text
from models import load_run


def autocast_of(run: OpenedRun) -> torch.autocast:
    amp = run.config.amp
    return torch.autocast(run.device.type, getattr(torch, amp), amp != "float32")


def predict_run(run: OpenedRun) -> Predictions:
    """Predict the labeled images of a run."""
    with autocast_of(run):
        return predict(run.network, run.loader(), run.card.classes, run.names(), run.measure)


def compare_runs(run: OpenedRun, predictions: Predictions, args: argparse.Namespace) -> list[dict]:
    """A row per other run, with its difference to this one on the same images."""
    rows = []
    groups = groups_of(predictions.images, args.sequences)
    for folder in args.compare:
        other = predict_run(open_run(folder, args.overrides))
        if other.images != predictions.images or other.classes != predictions.classes:
            raise UserError(
                f"--compare: {folder} has other test images than {run.folder}; name one set for "
                "both, as data.target_test.name=folder data.target_test.path=FOLDER"
            )
        found = dataclasses.asdict(difference(predictions, other, groups))
        rows.append({"run": str(folder), "compared_with": str(run.folder), **found})
    return rows


def features_of(run: OpenedRun, before: Path | None) -> dict[str, tuple[torch.Tensor, ...]]:
    """{before, after: features of both domains}; nothing if there is no source.

    Args:
        run: the adapted run.
        before: a run from before adaptation, or None.
    """
    source = run.domains and (run.domains.source_val or run.domains.source)
    if not source:
        return {}
    networks = {"after": run.network}
    if before is not None:
        network, card = load_run(before, run.device)
        if (card.classes, card.size) != (run.card.classes, run.card.size):
            raise UserError(f"--before: {before} has other classes, or images of another size")
        networks = {"before": network, **networks}
    with autocast_of(run):
        return {
            name: domain_features(network, source, run.images, run.config.data)
            for name, network in networks.items()
        }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], type=Path, metavar="RUN"
    )
    parser.add_argument("--sequences", metavar="P")
    parser.add_argument("--before", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    words = sys.argv[1:] if argv is None else argv
    overrides = [word for word in words if re.match(r"\w[\w.-]*=", word)]
    args = parser.parse_args([word for word in words if word not in overrides])
    if args.sequences and not args.compare:
        raise UserError("--sequences goes with --compare")
    args.overrides = overrides
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    run = open_run(args.run, args.overrides)
    predictions = predict_run(run)
    figures, summary = predictions.figures(), read_summary(args.run)
    print(f"{args.run}: {len(run.images)} images of {run.images.name} ({run.note})")
    print(figures_text(figures))
    if run.domains and (text := against_summary(figures, summary)):
        print(text)
    print(class_table(per_class(predictions)))

    features = features_of(run, args.before or run.start())
    distances = {name: proxy_a_distance(*parts[::2]) for name, parts in features.items()}
    never, records = never_predicted(predictions), read_metrics(args.run)
    sentences = diagnose(records, summary, figures, never, distances)
    print("diagnosis:", *sentences, sep="\n- ")

    folder = args.out or args.run / "evaluation" / re.sub(r"[^\w.-]+", "_", run.images.name)
    report = {
        "run": str(args.run),
        "images": run.images.name,
        "note": run.note,
        "count": len(run.images),
        "figures": figures,
        "a_distance": distances,
        "diagnosis": sentences,
    }
    if args.compare:
        report["comparison"] = rows = compare_runs(run, predictions, args)
        print(comparison_table(rows))
        write_csv(folder / "comparison.csv", list(rows[0]), [list(row.values()) for row in rows])
    write_text(folder / "figures.json", json.dumps(report, indent=2) + "\n")
    write_tables(predictions, folder)
    if features:
        write_features(features, folder / "features.npz")
    with autocast_of(run):
        write_examples(run.network, run.images, predictions, run.config.data, folder)
    if plots.available():
        plots.draw_all(args.run, predictions, features, run.card.method, folder)
    else:
        print(plots.HINT)
    print(f"all of it: {folder}")
    return 0


if __name__ == "__main__":
    exit_with(main)
