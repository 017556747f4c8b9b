"""Images per second of predict.py on many files, beside the bare forward, and its memory.

    python benchmarks/predict.py --files 10000

Photographs of 256 px are made in a temporary folder, as JPEG, and a run of an untrained network.
The bare forward takes one batch of prepared images again and again, in eval mode, before and after.
The memory is that of the process of predict.py, without its workers.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import exit_with  # noqa: E402
from common.files import save_tensors  # noqa: E402
from common.writing import write_text  # noqa: E402
from models import ModelCard, build_classifier, load_run  # noqa: E402
from models.card import CARD, card_text  # noqa: E402
from models.config import ModelConfig  # noqa: E402

SECONDS = 20  # of each measurement of the bare forward


def make_images(folder: Path, count: int) -> None:
    """JPEG files of about the size of a photograph reduced to 256 px; 100 different ones."""
    folder.mkdir()
    random = np.random.RandomState(0)
    contents = []
    for _ in range(100):
        coarse = Image.fromarray(random.randint(0, 256, (32, 32, 3), dtype=np.uint8))
        image = coarse.resize((256, 256), Image.Resampling.BICUBIC)
        image.save(folder / "image.jpg", quality=90)
        contents.append((folder / "image.jpg").read_bytes())
    (folder / "image.jpg").unlink()
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(contents[i % len(contents)])


def make_run(folder: Path, backbone: str) -> None:
    """A run folder with an untrained classifier of 10 classes at 224 px."""
    model = ModelConfig(backbone=backbone, channels_last=True)
    data = SimpleNamespace(task="classification", size=224, exif=True)
    kind = type("Config", (SimpleNamespace,), {"method": "untrained"})
    config = kind(model=model, data=data, amp="float32")
    classes = [str(i) for i in range(10)]
    network = build_classifier(model, len(classes), ".")
    save_tensors(folder / "model.pt", network.state_dict())
    write_text(folder / CARD, card_text(config, model, classes, 256))


def bare_forward(run: Path, batch: int) -> float:
    """Images per second of the network on one batch."""
    network, card = load_run(run)
    assert isinstance(card, ModelCard)
    images = torch.randint(0, 256, (batch, 3, card.size, card.size), dtype=torch.uint8)
    with torch.inference_mode():
        network(images)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            network(images)
            count += batch
    return count / (time.perf_counter() - start)


def resident(process: int) -> float:
    """MiB of memory of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def predict(run: Path, images: Path, out: Path, count: int, words: list[str]) -> dict:
    """Run predict.py: seconds between the first and the last row of its table, and memory."""
    command = [sys.executable, str(ROOT / "predict.py"), str(run), str(images), f"out={out}"]
    process = subprocess.Popen([*command, *words], stderr=subprocess.DEVNULL)
    table, rows, first, memory = out / "predictions.csv", 0, None, {}
    while process.poll() is None:
        time.sleep(0.05)
        if table.exists():
            now = table.read_bytes().count(b"\n") - 1
            if now > rows:
                rows, last = now, time.perf_counter()
                first = first or (now, last)
                quarter = min(4 * rows // count, 3)
                memory[quarter] = max(memory.get(quarter, 0), resident(process.pid))
    rate = (rows - first[0]) / (last - first[1])
    return {"code": process.returncode, "rows": rows, "rate": rate, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000, metavar="N")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_images(folder / "images", args.files)
        make_run(folder, args.backbone)
        before = bare_forward(folder, args.batch)
        words = [f"batch={args.batch}"]
        result = predict(folder, folder / "images", folder / "out", args.files, words)
        after = bare_forward(folder, args.batch)
    bare = (before + after) / 2
    print(
        f"{args.backbone}, {result['rows']} of {args.files} images of 256 px at 224 px, exit code "
        f"{result['code']}\npredict.py {result['rate']:.1f} images per second, bare forward "
        f"{before:.1f} before and {after:.1f} after: {result['rate'] / bare:.2f}\n"
        "largest memory in each quarter of the images, MiB: "
        + " ".join(f"{value:.0f}" for value in result["memory"].values())
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
