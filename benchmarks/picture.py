"""Draw docs/adaptation.png: what adaptation does to features and to maps, on the built-in data.

    python benchmarks/picture.py                # trains the four runs that it shows, if need be

Needs matplotlib. Upper row: two principal components of the features of the built-in digits of both
domains, without adaptation and with DANN. Lower row: one target image of the built-in street
scenes, its label, and the predictions without adaptation and with MinEnt: the image whose mean IoU
gains as much as the median image.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis import plots  # noqa: E402
from analysis.features import domain_features, principal_components  # noqa: E402
from analysis.measure import predict  # noqa: E402
from analysis.sets import load_evaluation_config, open_labeled_set  # noqa: E402
from common.drawing import class_colors  # noqa: E402
from common.errors import UserError, exit_with  # noqa: E402
from common.metrics import main_metric  # noqa: E402
from data import eval_loader  # noqa: E402
from data.tasks import task_module  # noqa: E402
from models import load_run  # noqa: E402
from training.evaluation import predict_labeled  # noqa: E402

DIGITS, STREET = "configs/demo/digits.yaml", "configs/demo/street.yaml"
RUNS = {  # folder: script and configs
    "digits_seed0": f"train_source.py --config {DIGITS}",
    "digits_dann_seed0": f"train_dann.py --config {DIGITS} configs/demo/dann.yaml",
    "street_seed0": f"train_source.py --config {STREET}",
    "street_minent_seed0": f"train_advent.py --config {STREET} configs/demo/street_minent.yaml",
}


def train(folder: Path) -> None:
    """Train the runs that are not finished yet."""
    for name, words in RUNS.items():
        command = [sys.executable, *shlex.split(words), f"out_dir={folder / name}", "seed=0"]
        subprocess.run([*command, "--resume"], check=True, cwd=ROOT)


def opened(run: Path) -> tuple:
    """(network, config, classes, labeled target images, all sets) of a run."""
    config = load_evaluation_config(run)
    network, card = load_run(run)
    images, _, domains = open_labeled_set(config, card.classes, named=False)
    return network, config.data, card.classes, images, domains


def draw_features(axes, run: Path, title: str) -> None:
    network, config, _, images, domains = opened(run)
    source, _, target, _ = domain_features(network, domains.source_val, images, config)
    points = principal_components(torch.cat([source, target]))
    plots.scatter_domains(axes, points[: len(source)], points[len(source) :])
    axes.set_title(f"{title}\naccuracy on the target {figure_of(run):.1f} %", fontsize=10)
    axes.set(xticks=[], yticks=[])


def figure_of(run: Path) -> float:
    """The main figure of a run on its labeled target images."""
    found = predictions(run)
    figures = found.measure(found.confusion())
    return figures[main_metric(figures)]


def predictions(run: Path):
    network, config, classes, images, _ = opened(run)
    measure = task_module(config).measure(config, classes)
    names = [str(i) for i in range(len(images))]
    return predict(network, eval_loader(images, config), classes, names, measure)


@torch.inference_mode()
def draw_maps(row, before: Path, after: Path) -> list[tuple[str, tuple]]:
    """Draw an image, its label, and two predictions; returns the colors of the classes."""
    ious = [predictions(run).image_ious() for run in (before, after)]
    number = int((ious[1] - ious[0]).argsort()[len(ious[0]) // 2])
    pictures = []
    for run in (before, after):
        network, config, classes, images, _ = opened(run)
        chosen = images.subset(torch.tensor([number]))
        loader = eval_loader(chosen, config)
        image, logits, label = next(iter(predict_labeled(network, loader, torch.device("cpu"))))
        pictures.append(logits[0].argmax(0))
    colors = class_colors(classes)
    masks = [label[0], *pictures]
    shown = [image[0].movedim(0, -1), *(colors[mask] for mask in masks)]
    titles = ["target image", "label"]
    titles += [
        f"{title}\nmean IoU {figure_of(run):.1f}"
        for title, run in (("not adapted", before), ("MinEnt", after))
    ]
    for axes, picture, title in zip(row, shown, titles, strict=True):
        axes.imshow(picture.numpy())
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    used = set(torch.cat([mask.flatten() for mask in masks]).tolist())
    return [(name, tuple(colors[i].tolist())) for i, name in enumerate(classes) if i in used]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/demo", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/adaptation.png", metavar="FILE")
    args = parser.parse_args()
    if not plots.available():
        raise UserError(plots.HINT)
    train(args.runs)
    digits, dann, street, minent = (args.runs / name for name in RUNS)
    figure = plots.new_figure(9, 6.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.75, 1])
    left, right = upper.subplots(1, 2)
    draw_features(left, digits, "not adapted")
    draw_features(right, dann, "DANN")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    entries = draw_maps(lower.subplots(1, 4), street, minent)
    for name, color in entries:
        place = lower.axes[-1]
        place.scatter([], [], marker="s", c=[[c / 255 for c in color]], label=name)
    lower.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    plots.save(figure, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
