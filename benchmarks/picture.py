"""Draw docs/adaptation.png: what adaptation does to features and to maps, on the built-in data.

    python benchmarks/picture.py                # trains the four runs that it shows, if need be

Needs matplotlib. Upper row: two principal components of the features of the built-in digits,
without adaptation and with DANN: the source in gray, the target in the colors of its classes. Lower
row: one target image of the built-in street scenes, its label, and the predictions without
adaptation and with MinEnt: the image whose mean IoU gains as much as that of the median image.
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
from analysis.figures import PALE, check_available, new_figure, save_figure  # noqa: E402
from analysis.measure import Predictions, predict  # noqa: E402
from analysis.sets import OpenedRun, open_run  # noqa: E402
from common.drawing import class_colors  # noqa: E402
from common.errors import exit_with  # noqa: E402
from common.metrics import main_metric  # noqa: E402
from data import eval_loader  # noqa: E402
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


def predictions(run: OpenedRun) -> Predictions:
    return predict(run.network, run.loader(), run.card.classes, run.names(), run.measure)


def figure_of(predicted: Predictions) -> float:
    """The main figure of a model on its labeled target images."""
    figures = predicted.measure(predicted.confusion())
    return figures[main_metric(figures)]


def draw_features(axes, run: OpenedRun, title: str) -> None:
    """Draw the features of the source in gray, and of the target in the style of their class."""
    images = run.domains.source_val, run.images
    source, _, target, labels = domain_features(
        run.network, *images, run.config.data, separate=True
    )
    points = principal_components(torch.cat([source, target]))
    gray = points[: len(source)].T.numpy()
    axes.scatter(*gray, s=8, c=PALE, linewidths=0, label="source, any class")
    plots.scatter_classes(axes, points[len(source) :], labels, run.card.classes)
    axes.set_title(f"{title}: accuracy on the target {figure_of(predictions(run)):.1f} %")
    axes.set(xticks=[], yticks=[])


@torch.inference_mode()
def draw_maps(row, runs: dict[str, OpenedRun]) -> None:
    """Draw an image, its label, and the prediction of each run, by title."""
    predicted = {title: predictions(run) for title, run in runs.items()}
    first, second = (model.image_ious() for model in predicted.values())
    number = int((second - first).argsort()[len(first) // 2])
    titles, masks = ["target image", "label"], []
    for title, run in runs.items():
        loader = eval_loader(run.images.subset(torch.tensor([number])), run.config.data)
        image, logits, label = next(iter(predict_labeled(run.network, loader, run.device)))
        masks.append(logits[0].argmax(0))
        titles.append(f"{title}\nmean IoU {figure_of(predicted[title]):.1f} %")
    classes = run.card.classes
    colors = class_colors(classes)
    masks = [label[0], *masks]
    pictures = [image[0].movedim(0, -1), *(colors[mask] for mask in masks)]
    for axes, picture, title in zip(row, pictures, titles, strict=True):
        axes.imshow(picture.numpy())
        axes.set_title(title)
        axes.axis("off")
    used = set(torch.cat([mask.flatten() for mask in masks]).tolist())
    for number, name in enumerate(classes):
        if number in used:
            axes.scatter([], [], marker="s", c=[(colors[number] / 255).tolist()], label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/demo", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/adaptation.png", metavar="FILE")
    args = parser.parse_args()
    check_available()
    train(args.runs)
    digits, dann, street, minent = (open_run(args.runs / name) for name in RUNS)
    figure = new_figure(9, 6.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.75, 1])
    left, right = upper.subplots(1, 2)
    draw_features(left, digits, "not adapted")
    draw_features(right, dann, "DANN")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    draw_maps(lower.subplots(1, 4), {"not adapted": street, "MinEnt": minent})
    save_figure(figure, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
