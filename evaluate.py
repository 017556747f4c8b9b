"""A finished run on labeled images: figures, tables, pictures, and what they say.

The images are those that the run has held out for its test, or any others with the same classes.
The model is that of model.pt, the selected step. Everything is written to RUN/evaluation/ and the
name of the set, in place of an earlier evaluation. docs/use.md explains every file.

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
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from analysis.compare import comparison_table, difference, groups_of
from analysis.diagnosis import diagnose
from analysis.examples import write_examples
from analysis.features import domain_features, proxy_a_distance, write_features
from analysis.figures import HINT, available
from analysis.measure import Predictions, predict
from analysis.plots import draw_all
from analysis.run_files import read_metrics, read_summary
from analysis.sets import OpenedRun, names_a_set, open_run
from analysis.tables import (
    against_summary,
    class_table,
    figures_text,
    per_class,
    remove_files,
    write_csv,
    write_tables,
)
from common.config import split_words
from common.errors import UserError, exit_with
from common.writing import write_text
from models import Network, load_run


def autocast_of(run: OpenedRun) -> torch.autocast:
    amp = run.config.amp
    return torch.autocast(run.device.type, getattr(torch, amp), amp != "float32")


def predict_run(run: OpenedRun) -> Predictions:
    """Predict the labeled images of a run."""
    with autocast_of(run):
        return predict(run.network, run.loader(), run.card.classes, run.names(), run.measure)


def compare_runs(
    run: OpenedRun, predictions: Predictions, others: list[OpenedRun], groups: torch.Tensor
) -> list[dict]:
    """A row per other run, with its difference to this one on the same images."""
    rows = []
    for other in others:
        second = predict_run(other)
        same = second.images == predictions.images and second.classes == predictions.classes
        if not same or not second.labels().equal(predictions.labels()):
            raise UserError(
                f"--compare: {other.folder} has other test images than {run.folder}; name one set "
                "for both, as data.target_test.name=folder data.target_test.path=FOLDER"
            )
        row = asdict(difference(predictions, second, groups))
        rows.append({"run": str(other.folder), "compared_with": str(run.folder), **row})
    return rows


def load_before(run: OpenedRun, named: Path | None) -> Network | None:
    """The model from before adaptation: the named run, else the one that this was started from."""
    folder = named or run.start()
    if folder is None or run.domains is None:
        return None
    try:
        network, card = load_run(folder, run.device)
        if (card.classes, card.size) != (run.card.classes, run.card.size):
            raise UserError(f"{folder} has other classes, or images of another size")
    except UserError as error:
        if named is not None:
            raise
        print(f"note: init_from is not shown as the model before adaptation: {error}")
        return None
    return network


def features_of(run: OpenedRun, before: Network | None) -> dict[str, tuple[torch.Tensor, ...]]:
    """{before, after: features of both domains}; nothing if there is no source."""
    source = run.source()
    if source is None:
        return {}
    networks = (
        {"after": run.network} if before is None else {"before": before, "after": run.network}
    )
    separate = run.card.model.bn == "separate"
    with autocast_of(run):
        return {
            name: domain_features(network, source, run.images, run.config.data, separate)
            for name, network in networks.items()
        }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="RUN key=value")
    parser.add_argument("--compare", nargs="+", action="extend", default=[], metavar="RUN")
    parser.add_argument("--sequences", metavar="P")
    parser.add_argument("--before", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    runs, overrides = split_words(args.words)
    args.compare, more = split_words(args.compare)
    args.overrides = [*overrides, *more]
    if len(runs) != 1:
        raise UserError(f"name one run, not {len(runs)}; others follow --compare")
    args.run = Path(runs[0])
    if args.sequences and not args.compare:
        raise UserError("--sequences goes with --compare")
    if args.before and names_a_set(args.overrides):
        raise UserError(
            "--before shows both domains of the run, but data.target_test names other images; "
            "leave one of them out"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    run = open_run(args.run, args.overrides)
    others = [open_run(Path(folder), args.overrides) for folder in args.compare]
    before = load_before(run, args.before)
    groups = groups_of(run.names(), args.sequences)
    predictions = predict_run(run)
    figures, summary = predictions.figures(), read_summary(args.run)
    print(f"{args.run}: {len(run.images)} images of {run.images.name} ({run.note})")
    if trained := run.trained_on():
        print(f"warning: {len(trained)} of them are source images, trained on: {trained[0]} ...")
    print(figures_text(figures))
    if run.domains and (text := against_summary(figures, summary)):
        print(text)
    rows = per_class(predictions)
    print(class_table(rows))
    features = features_of(run, before)
    distances = {name: proxy_a_distance(*parts[::2]) for name, parts in features.items()}
    distances = {name: value for name, value in distances.items() if value is not None}
    first = predict_run(replace(run, network=before)).figures() if before is not None else None
    sentences = diagnose(read_metrics(args.run), summary, figures, rows, distances, first)
    print("diagnosis:", *sentences, sep="\n- ")

    folder = args.out or args.run / "evaluation" / re.sub(r"[^\w.-]+", "_", run.images.name)
    remove_files(folder)
    report = {
        "run": str(args.run),
        "images": run.images.name,
        "note": run.note,
        "count": len(run.images),
        "figures": figures,
        "before": first,
        "a_distance": distances,
        "diagnosis": sentences,
    }
    if others:
        report["comparison"] = table = compare_runs(run, predictions, others, groups)
        print(comparison_table(table))
        write_csv(folder / "comparison.csv", list(table[0]), [list(x.values()) for x in table])
    write_text(folder / "figures.json", json.dumps(report, indent=2) + "\n")
    write_tables(predictions, folder)
    if features:
        write_features(features, folder / "features.npz")
    with autocast_of(run):
        write_examples(run.network, run.images, predictions, run.config.data, folder)
    if available():
        draw_all(args.run, predictions, features, run.card.method, folder)
    else:
        print(HINT)
    print(f"all of it: {folder}")
    return 0


if __name__ == "__main__":
    exit_with(main)
