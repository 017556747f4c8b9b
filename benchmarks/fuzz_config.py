"""Random mistakes in the configs of this project: each must be refused in a message, or run.

    python benchmarks/fuzz_config.py
    python benchmarks/fuzz_config.py --number 2000 --seed 1
    python benchmarks/fuzz_config.py --only 137          # one of them, with its file and output

Every config in configs/, with the script that its first line names, is put on the built-in images
and on a small network. Then it is changed at random: wrong types, huge and negative numbers,
unknown and deleted keys, swapped values and sections, deep nesting, aliases, binary and cut text,
in the file or as `key=value`. The script starts with --dry-run, on the CPU, in a fork with limited
memory and time. The outcomes are

    ran        accepted; one step of training and of evaluation passed
    refused    exit 2 with a short message
    diverged   exit 3: a loss is not finite
    nonsense   accepted, but the config does not read back from its own dump the same
    long       refused in a message of more than 5,000 characters
    traceback  an error that is not the user's, or another exit code
    hang       ended after too much CPU time or wall time

The last four are faults. Exit code 1: there was one.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import os
import random
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.config import all_keys, dump, dump_value, load_config, merge, read_config
from common.errors import exit_with
from data import drawn, drawn_street
from training.config import head_command, load_run_config

ROOT = Path(__file__).resolve().parents[1]
GOOD = ("ran", "refused", "diverged")
FAULTS = ("nonsense", "long", "traceback", "hang")
MEMORY, CPU_SECONDS, SECONDS = 4 * 2**30, 40, 240  # limits of one run, beyond what it starts with
LONG = 5000  # characters of a message
IMAGES = {"train": 200, "test": 20}  # built-in digits per split
STREETS = {"train": 6, "test": 3}
DATA = {
    "classification": {"source": "drawn_digits", "target": "drawn_digits_shifted"},
    "segmentation": {"source": "drawn_street", "target": "drawn_street_dusk"},
}
MODEL = {
    "classification": {"backbone": "lenet"},
    "segmentation": {"backbone": "mobilenet_v2", "output_stride": 16},
}
NUMBERS = (0, -1, 1, 2, 0.5, 1.5, 1e-300, 1e30, 1e308, -1e308, 2**31, 2**63, 2**63 - 1, 10**60)
WORDS = ("", " ", "x", "null", "off", "true", "1e-4", "nan", "/", "..", "~", "\n", "ü", "a: b")
VALUES = (None, True, False, [], {}, [[]], [None], [1, 2], ["x"], {"x": 1}, {"": None}, b"\xff\x00")


def load_script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


# --- the configs


def small(tree: dict, start: Path, source: bool) -> dict:
    """A config's tree on the built-in images, with a small network.

    Args:
        tree: of a config.
        start: the run that a method without a source starts from.
        source: whether the method has a source.
    """
    data = dict(tree.get("data", {}))
    task = data.get("task", "classification")
    names = DATA[task] if source else {"target": DATA[task]["target"]}
    data["source"] = None
    data |= {role: {"name": name} for role, name in names.items()}
    gone = ("target_test", "target_labeled", "test_share", "classes_from", "absent_classes")
    gone += ("iou_classes", "root", "size", "workers")  # large images take long
    data = {key: value for key, value in data.items() if key not in gone}
    data |= {"batch": 4, "eval_batch": 20, "select_images": 20, "cache": "cache"}
    keep = ("bn", "bn_running", "bn_affine", "channels_last")
    model = {key: value for key, value in tree.get("model", {}).items() if key in keep}
    tree = {**tree, "data": data, "model": {**model, **MODEL[task]}, "out_dir": "run"}
    # These keys need a run or weights, or take long (half precision is emulated on most CPUs).
    for key in ("source_steps", "fd_weight", "fd_classes", "amp"):
        tree.pop(key, None)
    return {**tree, "init_from": None if source else str(start)}


def base_configs(start: Path) -> list[tuple[str, dict]]:
    """(script, tree) of every config whose first line is the command of a training script."""
    bases = []
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        words = head_command(file)
        if not words or words[1] != "--config":
            continue
        script = load_script(ROOT / words[0])
        tree: dict = {}
        for name in words[2:]:
            if "=" not in name:
                tree = merge(script.Config, tree, read_config(str(ROOT / name)))
        has_source = "data" not in script.Config.__annotations__  # else it says that there is none
        bases.append((words[0], small(tree, start, has_source)))
    return bases


# --- the mistakes


def places(tree: dict, path: tuple = ()) -> list[tuple]:
    """The paths of all keys in nested mappings."""
    found = []
    for key, value in tree.items():
        found.append((*path, key))
        if isinstance(value, dict) and len(path) < 5:  # it may contain itself
            found += places(value, (*path, key))
    return found


def get(tree: dict, path: tuple):
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, path: tuple, value) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def remove(tree: dict, path: tuple) -> None:
    parent = get(tree, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def rubbish(rng: random.Random):
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(WORDS) * rng.choice((1, 1, 1, 5000))
    if kind == 2:
        value = rng.choice(NUMBERS + WORDS)
        for _ in range(rng.choice((1, 3, 70))):
            value = rng.choice(([value], {"x": value}))
        return value
    return copy.deepcopy(rng.choice(VALUES))  # later mistakes may change it


def near(value, rng: random.Random):
    """Another value of the same kind, which a config may well accept."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value * 2, value / 2, value * 10, -value, value + 1, int(value), 0, 1))
    if isinstance(value, list) and value:
        return rng.choice((value[::-1], value * 2, value[:1], [near(v, rng) for v in value]))
    return value if value is not None else rng.choice((1, 0.5, "x"))


def change(tree: dict, keys: list[tuple], rng: random.Random) -> tuple | None:
    """Make one mistake in the tree. Returns the path of a value that an override can set."""
    set_keys = places(tree)
    path = rng.choice(rng.choice((set_keys, keys)))
    other = rng.choice(set_keys)
    kind = rng.choice(("near", "near", "rubbish", "delete", "unknown", "swap", "share", "typo"))
    if kind in ("near", "rubbish"):
        put(tree, path, near(get(tree, path), rng) if kind == "near" else rubbish(rng))
        return path
    if kind == "delete":
        remove(tree, other)
    elif kind == "unknown":
        put(tree, (*path[:-1], rng.choice(WORDS) * rng.choice((1, 2000)) or "x"), rubbish(rng))
    elif kind == "swap":
        values = get(tree, path), get(tree, other)
        put(tree, other, values[0])
        put(tree, path, values[1])
    elif kind == "share":  # an alias in the file; or a circle
        put(tree, path, get(tree, other))
    else:
        value = get(tree, path)
        remove(tree, path)
        put(tree, (*path[:-1], path[-1][:-1] + rng.choice("aeiou_. ")), value)
    return None


def spoil(text: bytes, rng: random.Random) -> bytes:
    """A mistake in the text of a file."""
    lines = text.splitlines(keepends=True)
    i, place = rng.randrange(len(lines)), rng.randrange(len(text))
    bomb = b"".join(
        b"b%d: &b%d [%s]\n" % (n, n, b", ".join(9 * [b"*b%d" % (n - 1) if n else b"x"]))
        for n in range(9)
    )
    return rng.choice(
        (
            text[:place],
            text[:place] + rng.randbytes(rng.choice((1, 8))) + text[place:],
            text[:place]
            + rng.choice((b"\t", b":", b"{", b"*a", b"&a ", b"!!x ", b"\0"))
            + text[place:],
            b"".join([*lines[:i], *lines[i + 1 :]]),
            b"".join([*lines[:i], lines[i], *lines[i:]]),
            text + bomb,
            text + b"x: " + rng.choice((b"[", b"{a: ", b"- ")) * 3000,
            text + b"x: !!python/object/apply:os.mkdir [executed]\n",
        )
    )


def mistake(number: int, seed: int, bases: list, folder: Path) -> tuple[str, list[str]]:
    """(script, words of its command line) of one mutation; its file is written to `folder`."""
    rng = random.Random(f"{seed}/{number}")
    script, tree = rng.choice(bases)
    tree = copy.deepcopy(tree)
    keys = [tuple(key.split(".")) for key in all_keys(load_script(ROOT / script).Config)]
    overrides = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = change(tree, keys, rng)
        value = get(tree, path) if path else None
        if path and rng.random() < 0.3 and not isinstance(value, bytes):
            with contextlib.suppress(yaml.YAMLError, RecursionError):
                overrides.append(f"{'.'.join(path)}={dump_value(value)}".replace("\0", ""))
                remove(tree, path)
    try:
        text = yaml.safe_dump(tree, sort_keys=False).encode()
    except RecursionError:
        text = b"seed: 1\n"
    if rng.random() < 0.2:
        text = spoil(text, rng)
    file = folder / "config.yaml"
    file.write_bytes(text)
    return script, ["--config", str(file), *overrides, "--dry-run"]


# --- the runs


def run(module: ModuleType, words: list[str]) -> int:
    """Load the config, read it back from its dump, and start the script."""
    files = [word for word in words[1:] if "=" not in word and not word.startswith("--")]
    overrides = [word for word in words[1:] if "=" in word]
    config = load_run_config(module.Config, files, overrides)
    Path("dump.yaml").write_text(dump(config), encoding="utf-8")
    if load_config(module.Config, "dump.yaml") != config:
        print("the config does not read back from its dump")
        return 99
    return module.main(words)


def data_size() -> int:
    """Bytes of the memory of this process that the limit of its data counts (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmData:\s*(\d+) kB", status, re.M)[1])


def in_fork(work, folder: Path) -> tuple[int, str, float]:
    """(exit code or minus a signal, output, seconds) of `work()` in a limited fork in `folder`."""
    output = folder / "output"
    begin = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
            warnings.resetwarnings()  # as a command has them
            limit = data_size() + MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.argv = ["fuzz"]
            exit_with(work)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while time.monotonic() - begin < SECONDS:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.02)
    else:
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, output.read_text(errors="replace"), time.monotonic() - begin


def outcome(code: int, output: str) -> str:
    """One of GOOD or FAULTS."""
    if code < 0:
        return "hang"
    names = {0: "ran", 2: "refused", 3: "diverged", 99: "nonsense"}
    name = names.get(code, "traceback")
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if name in ("refused", "diverged") and "error: " not in output:
        return "traceback"
    return "long" if len(output) > LONG else name


@contextlib.contextmanager
def few_images():
    """Few built-in images, drawn once for all forks."""
    digits, streets = functools.cache(drawn.draw), functools.cache(drawn_street.draw)
    with (
        mock.patch.object(drawn, "draw", digits),
        mock.patch.object(drawn, "COUNT", IMAGES),
        mock.patch.object(drawn_street, "draw", streets),
        mock.patch.object(drawn_street, "COUNT", STREETS),
    ):
        for split in IMAGES:
            for shifted in (False, True):
                digits(split, shifted)
                streets(split, shifted)
        yield


def source_run(folder: Path) -> Path:
    """The run that methods without a source start from: one step of train_source.py."""
    tree = small({"steps": 1}, folder, True)
    file = folder / "source.yaml"
    file.write_text(yaml.safe_dump(tree))
    script = load_script(ROOT / "train_source.py")
    words = ["--config", str(file), f"out_dir={folder}/source"]
    code, output, _ = in_fork(lambda: script.main(words), folder)
    if code != 0:
        sys.exit(f"the source run failed:\n{output}")
    return folder / "source"


def fuzz(numbers, seed: int, show: bool = False) -> list[SimpleNamespace]:
    """The outcome of each mutation."""
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as temporary, few_images():
        folder = Path(temporary)
        bases = base_configs(source_run(folder))
        for number in numbers:
            script, words = mistake(number, seed, bases, folder)
            module = load_script(ROOT / script)
            code, output, seconds = in_fork(functools.partial(run, module, words), folder)
            result = SimpleNamespace(number=number, script=script, outcome=outcome(code, output))
            results.append(result)
            bad = result.outcome in FAULTS
            if show or bad:
                text = (folder / "config.yaml").read_text(errors="replace")
                last = (output.strip().splitlines() or [""])[-1][:200]
                print(
                    f"{number}  {script}  {result.outcome} (code {code}, {seconds:.1f} s)  {last}"
                )
                print(f"    {shlex.join(words[2:])[:300]}", flush=True)
                print(f"{text}\n{output}" if show else "", end="")
            if (folder / "executed").exists():
                sys.exit(f"{number}: a config was executed")
    return results


def table(results: list[SimpleNamespace]) -> str:
    """Scripts by outcomes, in markdown."""
    columns = [*GOOD, *FAULTS]
    counts = Counter((result.script, result.outcome) for result in results)
    lines = [f"| script | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for script in sorted({result.script for result in results}):
        cells = [str(counts[script, name]) for name in columns]
        lines.append(f"| {script} | {' | '.join(cells)} |")
    totals = [sum(counts[s, name] for s in {r.script for r in results}) for name in columns]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} |"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=500, metavar="N", help="of mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="run this one and show it")
    args = parser.parse_args(argv)
    numbers = range(args.number) if args.only is None else [args.only]
    begin = time.monotonic()
    results = fuzz(numbers, args.seed, args.only is not None)
    print(table(results))
    print(f"{len(results)} mutations, seed {args.seed}, {time.monotonic() - begin:.0f} s")
    return 1 if any(result.outcome in FAULTS for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
