"""Images per second of the input alone: loading, drawing numbers, transfer and pixels.

    python benchmarks/input.py
    python benchmarks/input.py --workers 0 2 --device cpu
    python benchmarks/input.py --files 20000

The first two print a table of recipes on generated images that are decoded already. The stages are
CPU seconds per image of one thread: `load` fetches stored images (and crops those with masks),
`draw` draws the numbers of their augmentation, and `pixels` computes the views. A CUDA device
computes the pixels of batches that the loader leaves raw; `raw` is what a core then still has to
do, transfer included. The last columns are images per second of wall time, in this process and with
each number of workers.

The third generates that many JPEG files in a temporary folder and trains on them, with room for a
tenth of them in memory (`data.cache_gb`): time to the first step, the first and the second pass
over the files, and the largest memory.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_source
from common.errors import exit_with
from data.config import DataConfig, DomainConfig
from data.image_set import ImageSet, image_set
from data.loaders import train_loader
from data.memory import empty_batch
from data.tasks import task_module
from data.views import to_views
from training.device import get_device
from training.run import Run

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
STRONG = {"jitter": JITTER, "blur": {"sigma": [0.1, 1.5]}}
DIGITS = {"invert": 0.5, "gain": [0.4, 1.5], "channel_gain": [0.5, 1.5], "channel_offset": 0.3}
COUNT = 256  # generated images of a recipe, fewer if they are large
COLUMNS = "recipe", "batch", "load, us", "draw, us", "pixels, us", "raw, us", "images per second"


@dataclass
class Recipe:
    """An augmentation of generated images.

    Attributes:
        side: height and width of the stored images.
        size: px of the views, or height and width of crops of images with masks.
        batch: images per batch.
        augment, strong: of the weak and of the strong view, which is None for labeled images.
        channels: of the images.
    """

    side: tuple[int, int]
    size: int | tuple[int, int]
    batch: int
    augment: dict = field(default_factory=dict)
    strong: dict | None = None
    channels: int = 3

    @property
    def masks(self) -> bool:
        return not isinstance(self.size, int)


CROP = {"crop": {}, "flip": {}}
ZOOM = {"zoom": {"scale": [1.0, 2.0]}, "flip": {}}
RECIPES = {
    "Office: 256 to 224 px, crop and flip": Recipe((256, 256), 224, 32, CROP),
    "Office with jitter": Recipe((256, 256), 224, 32, {**CROP, "jitter": JITTER}),
    "VisDA: center crop and flip": Recipe((256, 256), 224, 32, {"flip": {}}),
    "VisDA, weak and strong view": Recipe((256, 256), 224, 32, {"flip": {}}, STRONG),
    "GTA5: 720x1280 px whole": Recipe((720, 1280), (720, 1280), 2),
    "GTA5: 512x1024 of 720x1280 px, zoom and flip": Recipe((720, 1280), (512, 1024), 2, ZOOM),
    "GTA5: 512x512 px, weak and strong view": Recipe((512, 1024), (512, 512), 2, {}, STRONG),
    "digits": Recipe((28, 28), 28, 64, channels=1),
    "digits, weak and strong view": Recipe(
        (28, 28), 28, 64, {}, {"affine": {"degrees": 15}, "photometric": {**DIGITS, "noise": 0.1}}
    ),
}


class Stored:
    """Generated images in memory, as `data.decoded.Decoded` keeps them."""

    def __init__(self, count: int, side: tuple[int, int], channels: int):
        shape = (*side, channels) if channels else side
        random = torch.Generator().manual_seed(0)
        high = 256 if channels else 19
        self.pixels = torch.randint(high, (count, *shape), dtype=torch.uint8, generator=random)
        self.shapes = [(channels, *side) if channels else side] * count

    def __len__(self) -> int:
        return len(self.pixels)

    def one(self, i: int) -> torch.Tensor:
        pixels = self.pixels[i]
        return pixels.movedim(-1, 0) if pixels.dim() == 3 else pixels

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        batch = empty_batch((len(index), *self.pixels.shape[1:]))
        torch.index_select(self.pixels, 0, index, out=batch)
        return batch.movedim(-1, 1) if batch.dim() == 4 else batch


def generated(recipe: Recipe, workers: int) -> tuple[ImageSet, DataConfig]:
    """The images of a recipe, and the section `data` that makes batches of them."""
    count = max(min(COUNT, 2**26 // (3 * recipe.side[0] * recipe.side[1])), recipe.batch)
    images = Stored(count, recipe.side, recipe.channels)
    task, size = "classification", 28
    crop = None
    labels = torch.zeros(count, dtype=torch.int64)
    if recipe.masks:
        task, crop = "segmentation", recipe.size
        labels = Stored(count, recipe.side, 0)
    else:
        size = recipe.size
    if recipe.strong is not None:
        labels = None
    domain = DomainConfig(name="list", path="generated")
    section = {"augment": recipe.augment, "batch": recipe.batch, "workers": workers}
    config = DataConfig(source=domain, target=domain, task=task, size=size, **section)
    classes = [str(i) for i in range(19)]
    return image_set("generated", images, labels, classes, crop), config


def cpu_seconds(call: Callable[[int], object], seconds: float) -> float:
    """The median CPU seconds of call(0), call(1), ... within about `seconds`, after a warm-up."""
    times, end, k = [], time.monotonic() + seconds, 0
    while k < 3 or time.monotonic() < end:
        start = time.process_time()
        call(k)
        times.append(time.process_time() - start)
        k += 1
    return statistics.median(times[1:])


def stages(recipe: Recipe, device: torch.device, seconds: float) -> dict[str, float]:
    """Microseconds of CPU time per image: load, draw, pixels, and raw with the transfer."""
    images, config = generated(recipe, 0)
    module = task_module(config)
    batches = module.TrainBatches(images, config, 0, "source", recipe.strong, raw=True)
    numbers = [batches.order.rows(k) for k in range(64)]

    def load(k: int):
        positions, places = numbers[k % 64]
        return batches.load(images.indices[places], positions)

    def draw(k: int):
        positions, _ = numbers[k % 64]
        for augment, purpose in ((batches.weak, "augment"), (batches.strong, "strong")):
            if augment is not None:
                augment.draw(batches.draws(positions, purpose))

    raw = [batches[k] for k in range(4)]
    loaded = [batch._replace(images=batch.images.clone()) for batch in raw]

    def pixels(k: int):
        batch = loaded[k % 4]
        return batch._replace(images=batch.images.clone()).views()

    def raw_batch(k: int):
        batch = batches[k]
        images, labels = (x if x is None else x.to(device, non_blocking=True) for x in batch[:2])
        return images, labels

    calls = {"load": load, "draw": draw, "pixels": pixels, "raw": raw_batch}
    return {
        name: 1e6 * cpu_seconds(call, seconds / 4) / recipe.batch for name, call in calls.items()
    }


def throughput(recipe: Recipe, device: torch.device, workers: int, seconds: float) -> float:
    """Images per second of wall time, views computed."""
    images, config = generated(recipe, workers)
    loader = train_loader(images, config, 0, "source", 0, 10**6, recipe.strong, device=device)
    batches = iter(loader)
    for _ in range(3):
        to_views(next(batches), device)
    count, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        to_views(next(batches), device)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    rate = count * recipe.batch / (time.monotonic() - start)
    for worker in batches.workers:
        worker.kill()
    return rate


def measure(device: torch.device, workers: list[int], seconds: float) -> list[dict]:
    """One row per recipe; a row has the stages and, by number of workers, images per second."""
    rows = []
    for name, recipe in RECIPES.items():
        row = {"recipe": name, "batch": recipe.batch, **stages(recipe, device, seconds)}
        rates = {count: throughput(recipe, device, count, seconds) for count in workers}
        rows.append({**row, "images_per_second": rates})
    return rows


def table(rows: list[dict], workers: list[int]) -> str:
    """The rows as a table in markdown."""
    names = [f"{COLUMNS[-1]}, {n} workers" if n else f"{COLUMNS[-1]}, no worker" for n in workers]
    columns = [*COLUMNS[:-1], *names]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        figures = [f"{row[stage]:,.0f}" for stage in ("load", "draw", "pixels", "raw")]
        rates = [f"{row['images_per_second'][count]:,.0f}" for count in workers]
        cells = [row["recipe"], str(row["batch"]), *figures, *rates]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_files(folder: Path, count: int) -> None:
    """Generate JPEG files of 256x256 px in two classes."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    pictures = [
        np.asarray(Image.fromarray(x).resize((256, 256), Image.Resampling.BICUBIC)) for x in coarse
    ]
    for i in range(count):
        target = folder / f"class{i % 2}"
        target.mkdir(parents=True, exist_ok=True)
        shifted = np.roll(pictures[i % 64], i, axis=1)
        Image.fromarray(shifted).save(target / f"{i:06d}.jpg", quality=85)


def train_on_files(count: int) -> dict[str, float]:
    """Train source-only on that many generated files, for two passes.

    Returns:
        Seconds to the first step, of the first and of the second pass, and GiB of memory.
    """
    marks, steps, batch = [], Run.steps, 100
    per_pass = -(-count // batch)

    def marked(run: Run, start: int):
        for step in steps(run, start):
            if step in (1, 1 + per_pass):
                marks.append(time.monotonic())
            yield step
        marks.append(time.monotonic())

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "images")
        write_files(root / "source", count)
        write_files(root / "target", 100)
        config = Path(temporary, "config.yaml")
        cache_gb = 0.1 * count * 256 * 256 * 3 / 2**30
        source, target = (
            f"{{name: folder, path: {name}, resize: 256}}" for name in ("source", "target")
        )
        config.write_text(
            f"data: {{source: {source}, target: {target}, root: {root}, size: 32, source_val: 0, "
            f"batch: {batch}, cache: {temporary}/cache, cache_gb: {cache_gb}, "
            f"augment: {{crop: {{}}, flip: {{}}}}, select_images: 100}}\n"
            "model: {backbone: lenet}\noptim: {lr: 0.001}\n"
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Run.steps = marked
        begin = time.monotonic()
        total = 2 * per_pass
        keys = [f"{key}={total}" for key in ("steps", "eval_every", "save_every")]
        train_source.main(["--config", str(config), *keys, f"out_dir={temporary}/run"])
        Run.steps = steps
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    first, second, end = marks
    return {
        "first step": first - begin,
        "first pass": second - first,
        "second pass": end - second,
        "GiB": memory,
        "cache_gb": cache_gb,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    workers_help = "processes of a loader, of each of which images per second are measured"
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help=workers_help)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--files", type=int, help="train on this many generated JPEG files")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.files:
        figures = train_on_files(args.files)
        print(", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    else:
        figures = measure(get_device(args.device), args.workers, args.seconds)
        print(table(figures, args.workers))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
