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
from dataclasses import dataclass
from pathlib import Path

import torch

from analysis import plots
from analysis.compare import comparison_table, difference, groups_of
from analysis.curves import learning_curves
from analysis.diagnosis import diagnose
from analysis.examples import write_examples
from analysis.features import domain_features, proxy_a_distance, write_features
from analysis.measure import Predictions, predict
from analysis.run_files import read_metrics, read_summary
from analysis.sets import EvaluationConfig, load_evaluation_config, names_a_set, open_labeled_set
from analysis.tables import (
    against_summary,
    class_table,
    figures_text,
    image_names,
    never_predicted,
    per_class,
    write_csv,
    write_tables,
)
from common.errors import UserError, exit_with
from common.files import write_text
from data import Domains, eval_loader
from data.image_set import ImageSet
from data.tasks import task_module
from models import ModelCard, Network, load_run
from training.device import get_device


@dataclass
class Opened:
    """A run, its labeled images, and what its model predicts on them."""

    run: Path
    config: EvaluationConfig
    network: Network
    card: ModelCard
    images: ImageSet
    note: str  # what the images are
    domains: Domains | None  # all sets of the run; None if the images are others
    predictions: Predictions


def autocast_of(config: EvaluationConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, getattr(torch, config.amp), config.amp != "float32")


def open_run(run: Path, overrides: Sequence[str]) -> Opened:
    """Load a run and predict its labeled images."""
    config = load_evaluation_config(run, overrides)
    device = get_device(config.device)
    network, card = load_run(run, device)
    named = names_a_set(overrides)
    images, note, domains = open_labeled_set(config, card.classes, named)
    loader = eval_loader(images, config.data, device=device)
    names = image_names(images, Path(config.data.root))
    measure = task_module(config.data).measure(config.data, card.classes)
    with autocast_of(config, device):
        predictions = predict(network, loader, card.classes, names, measure)
    return Opened(run, config, network, card, images, note, domains, predictions)


def compare_runs(first: Opened, args: argparse.Namespace) -> list[dict]:
    """A row per other run, with its difference to the first one on the same images."""
    rows = []
    groups = groups_of(first.predictions.images, args.sequences)
    for name in args.compare:
        other = open_run(Path(name), args.overrides)
        if other.predictions.images != first.predictions.images:
            raise UserError(
                f"--compare: {name} has other test images than {first.run}; name one set for all, "
                "as data.target_test.name=folder data.target_test.path=FOLDER"
            )
        found = difference(first.predictions, other.predictions, groups)
        rows.append({"run": name, "compared_with": str(first.run), **dataclasses.asdict(found)})
    return rows


def features_of(opened: Opened, run: Path | None) -> dict[str, tuple[torch.Tensor, ...]]:
    """{before, after: features of both domains}; nothing without a source.

    Args:
        opened: the adapted run.
        run: the one from before adaptation, or None.
    """
    domains, config = opened.domains, opened.config
    source = domains and (domains.source_val or domains.source)
    if not source:
        return {}
    networks = {"after": (opened.network, opened.card)}
    if run is not None:
        networks = {"before": load_run(run, get_device(config.device)), **networks}
        card = networks["before"][1]
        if (card.classes, card.size) != (opened.card.classes, opened.card.size):
            raise UserError(f"--before: {run} has other classes, or images of another size")
    with autocast_of(config, get_device(config.device)):
        return {
            title: domain_features(network, source, opened.images, config.data)
            for title, (network, _) in networks.items()
        }


def draw(opened: Opened, features: dict, figures: dict, folder: Path) -> None:
    """Write all pictures."""
    predictions, run = opened.predictions, opened.run
    plots.plot_confusion(predictions.confusion(), predictions.classes, folder / "confusion.png")
    plots.plot_reliability(predictions.bins, figures["ece"], folder / "reliability.png")
    if features:
        titles = {"before": "before adaptation", "after": f"after: {opened.card.method}"}
        columns = {titles[name]: value for name, value in features.items()}
        plots.plot_features(columns, predictions.classes, folder / "features.png")
    if records := read_metrics(run):
        learning_curves(records, read_summary(run), folder / "curves.png")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--compare", nargs="+", action="extend", default=[], metavar="RUN")
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


def run_before(opened: Opened, named: Path | None) -> Path | None:
    """The run whose features are shown beside those of the adapted one, if there is one."""
    start = opened.config.init_from
    if named is None and start is not None and Path(start).is_dir():
        return Path(start)
    return named


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    opened = open_run(args.run, args.overrides)
    predictions, images, config = opened.predictions, opened.images, opened.config
    autocast = autocast_of(config, get_device(config.device))
    figures, summary = predictions.figures(), read_summary(args.run)
    print(f"{args.run}: {len(images)} images of {images.name} ({opened.note})")
    print(figures_text(figures))
    if opened.domains and (text := against_summary(figures, summary)):
        print(text)
    print(class_table(per_class(predictions)))

    features = features_of(opened, run_before(opened, args.before))
    distances = {title: proxy_a_distance(*parts[::2]) for title, parts in features.items()}
    never = never_predicted(predictions)
    sentences = diagnose(read_metrics(args.run), summary, figures, never, distances)
    print("diagnosis:", *sentences, sep="\n- ")

    folder = args.out or args.run / "evaluation" / re.sub(r"[^\w.-]+", "_", images.name)
    report = {
        "run": str(args.run),
        "images": images.name,
        "note": opened.note,
        "count": len(images),
        "figures": figures,
        "a_distance": distances,
        "diagnosis": sentences,
    }
    if args.compare:
        report["comparison"] = rows = compare_runs(opened, args)
        print(comparison_table(rows))
        write_csv(folder / "comparison.csv", list(rows[0]), [list(row.values()) for row in rows])
    write_text(folder / "figures.json", json.dumps(report, indent=2) + "\n")
    write_tables(predictions, folder)
    if features:
        write_features(features, folder / "features.npz")
    with autocast:
        write_examples(opened.network, images, predictions, config.data, folder)
    if plots.available():
        draw(opened, features, figures, folder)
    else:
        print(plots.HINT)
    print(f"all of it: {folder}")
    return 0


if __name__ == "__main__":
    exit_with(main)
