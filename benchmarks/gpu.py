"""All that a GPU can show, by one command: tests, speed of the scripts, and input.

    make gpu
    python benchmarks/gpu.py --out runs/gpu

It runs the tests marked `gpu`, benchmarks/speed.py and benchmarks/input.py, on generated images and
with untrained weights, so that it needs nothing but the repository. It writes OUT.json and OUT.md
and takes less than ten minutes; what is not done by then is left out, and the table says so. The
table belongs into benchmarks/README.md, with the name of the card.

Exit codes: 0 done; 1 a test or a benchmark failed; 2 there is no GPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import input as inputs
from benchmarks.speed import HEADER
from common.errors import UserError, exit_with
from common.provenance import code_version
from training.device import describe_machine, get_device

ROOT = Path(__file__).parents[1]
LIMIT = 570  # s; of the whole
TESTS_LIMIT = 240  # s; of the tests
CLASSIFICATION = """\
data:
  source: {name: folder, path: source}
  target: {name: folder, path: target}
  size: 224
  batch: 32
  augment: {crop: {}, flip: {}}
model: {backbone: resnet50, bottleneck: 256, channels_last: true}
amp: bfloat16
"""
SEGMENTATION = """\
data:
  task: segmentation
  source: {name: folder, path: scenes, masks: masks, ids: [a, b, c, d], crop: [512, 1024]}
  target: {name: folder, path: scenes, masks: masks, ids: [a, b, c, d], crop: [512, 1024]}
  target_test: {name: folder, path: scenes, masks: masks, ids: [a, b, c, d]}
  source_val: 0
  batch: 1
model: {backbone: resnet101, aux_weight: 0.1, bn: separate, channels_last: true}
amp: bfloat16
"""
STRONG = "{jitter: {brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1}, blur: {}}"
CROPS = ["data.source.crop=[512, 512]", "data.target.crop=[512, 512]", "data.batch=2"]
FAST = ["deterministic=false"]
SPEED = [  # script, config, overrides
    ("train_dann", CLASSIFICATION, []),
    ("train_dann", CLASSIFICATION, FAST),
    ("train_dann", CLASSIFICATION, [*FAST, "reversal_bound=null"]),
    ("train_dann", CLASSIFICATION, [*FAST, "reversal_bound=null", "compile=true"]),
    ("train_dann", CLASSIFICATION, [*FAST, "amp=float32"]),
    ("train_pseudo", CLASSIFICATION, [*FAST, f"strong_augment={STRONG}"]),
    ("train_advent", SEGMENTATION, ["ent_weight=0.0", "adv_weight=0.001"]),
    ("train_advent", SEGMENTATION, [*FAST, "ent_weight=0.0", "adv_weight=0.001"]),
    ("train_pseudo", SEGMENTATION, [*FAST, *CROPS, "mix=classmix", f"strong_augment={STRONG}"]),
]


def generate(folder: Path, images: int = 64, scenes: int = 8) -> None:
    """Write JPEG images of two domains in two classes, and scenes with masks."""
    random = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        coarse = random.integers(0, 256, (9, 16, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    for i in range(images):
        for name in ("source", "target"):
            target = folder / name / f"class{i % 2}"
            target.mkdir(parents=True, exist_ok=True)
            picture(300, 400).save(target / f"{i:03d}.jpg")
    for name in ("scenes", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(scenes):
        picture(720, 1280).save(folder / "scenes" / f"{i:03d}.jpg")
        mask = random.integers(0, 4, (9, 16), dtype=np.uint8)
        resized = Image.fromarray(mask).resize((1280, 720), Image.Resampling.NEAREST)
        resized.save(folder / "masks" / f"{i:03d}.png")


def run(words: list[str], seconds: float) -> tuple[int, str]:
    """(exit code, output) of a python command; code 124 if it takes longer than that."""
    command = [sys.executable, *words]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout + done.stderr * (done.returncode != 0)


def run_tests(seconds: float) -> dict:
    """The outcome of the tests marked `gpu`."""
    words = ["-m", "pytest", "tests/test_gpu.py", "-q", "--maxfail", "5", "--tb", "short"]
    code, out = run([*words, "-n", "4", "--dist", "load"], seconds)
    if code != 0:
        print(out[-6000:], file=sys.stderr)
    found = re.findall(r"^.*\d+ (?:passed|failed|skipped|error).*$", out, re.M)
    return {"code": code, "outcome": found[-1].strip("= ") if found else f"exit code {code}"}


def speed_row(script: str, config: Path, overrides: list[str], seconds: float) -> str | None:
    """The line of benchmarks/speed.py; None if it failed or took too long."""
    words = ["benchmarks/speed.py", f"{script}.py", "--config", str(config), *overrides]
    code, out = run([*words, "--rounds", "7", "--steps", "10"], seconds)
    if code != 0:
        print(f"{script} {' '.join(overrides)}: exit code {code}\n{out[-2000:]}", file=sys.stderr)
        return None
    return out.strip().splitlines()[-1]


def measure(device: torch.device, begin: float) -> dict:
    """All figures: `machine`, `commit`, `tests`, `speed` (lines) and `input` (rows)."""
    figures = {"machine": describe_machine(device), "commit": code_version()}
    figures["tests"] = run_tests(TESTS_LIMIT)
    print(f"tests: {figures['tests']['outcome']}", flush=True)
    figures["speed"], figures["input"], figures["left_out"] = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary, "images"), Path(temporary, "input.json")
        generate(folder)
        words = ["benchmarks/input.py", "--workers", "0", "4", "--seconds", "1"]
        code, out = run([*words, "--device", device.type, "--json", str(rows)], 120)
        if code == 0:
            figures["input"] = json.loads(rows.read_text())
        else:
            print(out[-2000:], file=sys.stderr)
            figures["left_out"].append("input")
        print(f"input: exit code {code}", flush=True)
        for script, text, overrides in SPEED:
            config = Path(temporary, "scenes.yaml" if text == SEGMENTATION else "images.yaml")
            places = f"  root: {folder}\n  cache: {temporary}/cache\n"
            lines = text.replace("data:\n", f"data:\n{places}")
            config.write_text(f"{lines}device: {device.type}\n")
            left = LIMIT - (time.monotonic() - begin)
            line = speed_row(script, config, overrides, left) if left > 10 else None
            if line is None:
                figures["left_out"].append(f"{script} {' '.join(overrides)}")
            else:
                figures["speed"].append(line)
            print(line or f"{script} {' '.join(overrides)}: left out", flush=True)
    return figures


def text_of(figures: dict) -> str:
    """The figures in markdown."""
    lines = [
        f"{figures['machine']}, commit {figures['commit']}.",
        "",
        f"Tests marked `gpu`: {figures['tests']['outcome']}.",
        "",
        HEADER,
        *figures["speed"],
        "",
    ]
    if figures["input"]:
        rows = [
            {**row, "images_per_second": {int(k): v for k, v in row["images_per_second"].items()}}
            for row in figures["input"]
        ]
        lines += [inputs.table(rows, list(rows[0]["images_per_second"])), ""]
    if figures["left_out"]:
        lines.append(f"Left out: {'; '.join(figures['left_out'])}.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="without its ending")
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; run this where there is one")
    figures = measure(get_device(args.device), begin)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(text_of(figures) + "\n")
    print(f"{args.out}.json and {args.out}.md, after {time.monotonic() - begin:.0f} s")
    return 1 if figures["left_out"] or figures["tests"]["code"] != 0 else 0


if __name__ == "__main__":
    exit_with(main)
