"""Several processes train the same thing as one."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import training.config
from common import averages, ranks
from common import metrics as counters
from common.errors import UserError
from data import segmentation
from losses import (
    cdan,
    contrastive,
    coral,
    entropy,
    feature_distance,
    mcc,
    mmd,
    pseudo_label,
    supervised,
)
from models import build_model, gradient_reversal
from models.network import Network
from tests.helpers import (
    ONLY_CLASSIFICATION,
    ROOT,
    SOURCE_FREE,
    TRAINING,
    Processes,
    any_config,
    differing,
    load_script,
    metrics,
    others_slow,
    start_on,
    status,
    train,
    train_on,
)
from training import collapse, device, evaluation, log, run
from training.config import load_run_config

# Without batch norm and dropout, whose statistics and draws are those of a process.
PLAIN = "{batch_norm: false}"
ROUNDING = 1e-5  # of weights after five steps; it grows with them


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    """Every floating tensor in nested dicts and lists, by its dotted name."""
    if isinstance(value, torch.Tensor):
        return {name: value} if value.is_floating_point() else {}
    if not isinstance(value, (dict, list, tuple)):
        return {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, item in items:
        found |= tensors(item, f"{name}.{key}")
    return found


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights and statistics in the last checkpoint, of all that a run saves.

    The log's sums are of each process, and an optimizer's momenta are as large as the gradients.
    Predictions follow from the weights, and logits in half precision are coarse.
    """
    newest = max((folder / "checkpoints").glob("*.pt"))
    state = torch.load(newest, weights_only=True)
    skipped = [name for name in state if name in ("log", "predictions")]
    skipped += [name for name in state if name.endswith("optimizer")]
    return tensors({name: value for name, value in state.items() if name not in skipped})


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_equal_runs(one: Path, two: Path) -> None:
    """Weights, statistics and all that is logged differ by rounding only."""
    assert largest_difference(last_state(one), last_state(two)) < ROUNDING
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            rounded = isinstance(value, float)
            assert other[name] == (pytest.approx(value, 1e-4, 1e-7) if rounded else value), name
    if (one / "predictions.pt").exists():  # a script that is given may have none
        predictions = [torch.load(folder / "predictions.pt") for folder in (one, two)]
        for name in ("last", "selected"):
            first, second = (x[name].float() for x in predictions)
            torch.testing.assert_close(first, second, rtol=0.01, atol=0.01)


# --- runs

PSEUDO = {"threshold": 0.1, "div_weight": 0.1}
RELATIVE = {
    "threshold_mode": "relative",
    "threshold": 0.5,
    "distribution_alignment": "true",
    "weighting": "confident_fraction",
}
SELFSUP = {
    "flip_weight": 1,
    "location_weight": 1,
    "contrastive_weight": 1,
    "strong_augment": "{photometric: {gain: [0.5, 1.5]}}",
}
FEW = "{source: {name: drawn_digits}, target: {name: drawn_digits_shifted}, target_labeled: 2, "
FEW += "batch: 8, target_batch: 4, eval_batch: 20, select_images: 30}"
CASES = {
    "source": ("train_source", {}),
    "few_labels": ("train_source", {"data": FEW}),
    "few_labels_dann": ("train_dann", {"data": FEW, "disc_norm": "none"}),
    "mcc": ("train_mcc", {}),
    "mdd": ("train_mdd", {"reversal_max": 0.01}),
    "mmd": ("train_mmd", {}),
    "coral": ("train_mmd", {"mmd_weight": 0, "coral_weight": 10}),
    "dann": ("train_dann", {"disc_norm": "none"}),
    "dann_bounded": (
        "train_dann",
        {"disc_norm": "none", "reversal_bound": 0.01, "reversal_schedule": "constant"},
    ),
    "dann_unbounded": ("train_dann", {"disc_norm": "none", "reversal_bound": "null"}),
    "cdan_e": ("train_dann", {"disc_norm": "none", "conditional": "cdan_e"}),
    "advent": ("train_advent", {"adv_weight": 0.1, "div_weight": 0.1, "ent_weight": 0.1}),
    "pseudo": ("train_pseudo", PSEUDO),
    "relative": ("train_pseudo", RELATIVE),
    "class_balanced": ("train_pseudo", {"threshold_mode": "class_balanced", "evaluate": "teacher"}),
    "mic": ("train_mic", {"threshold": 0.1, "mask_block": 7}),
    "adda": ("train_adda", {"disc_norm": "none", "source_steps": 2}),
    "shot": ("train_shot", {}),
    "aad": ("train_aad", {}),
    "selfsup": ("train_selfsup", SELFSUP),
    "finetune": ("finetune", {}),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A source model that tells the digits apart; an untrained one gives all images one output.

    At 16 px this takes 200 steps.
    """
    folder = tmp_path_factory.mktemp("learned")
    config = any_config("train_source", folder, model=PLAIN, optim="{lr: 0.1}")
    keys = "steps=200", "eval_every=200", "save_every=200", "data.batch=32"
    assert train("train_source", config, *keys) == 0
    return folder / "run"


VARIANTS = ("few_labels_dann", "dann_unbounded", "coral", "class_balanced")  # of another case
ALWAYS = tuple(case for case in CASES if case not in VARIANTS)


@pytest.mark.parametrize("case", others_slow(CASES, ALWAYS))
def test_two_processes_are_one(tmp_path, learned, case):
    script, changes = CASES[case]
    lines = {"model": PLAIN, "steps": 5, "eval_every": 5, "save_every": 5, **changes}
    lines |= {} if script in SOURCE_FREE else {"init_from": learned}
    config = any_config(script, tmp_path, **lines)
    assert train(script, config, f"out_dir={tmp_path}/one") == 0
    train_on(2, script, config, f"out_dir={tmp_path}/two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


FROZEN = "{backbone: mobilenet_v2, output_stride: 16, aux_weight: 0.1, bn: frozen}"
STREETS = {
    "train_source": {},
    "train_mcc": {},
    "train_mdd": {},
    # Deeper features of an untrained network, with frozen statistics, differ by rounding alone.
    "train_mmd": {"optim": "{lr: 0.0001}", "feature_layers": "[layer1]"},
    "train_dann": {"disc_norm": "none"},
    "train_advent": {"adv_weight": 0.1, "div_weight": 0.1, "ent_weight": 0.1},
    "train_pseudo": RELATIVE,
    "train_mic": {"mix": "classmix", "threshold": 0.1, "mask_block": 16},
    "train_adda": {"disc_norm": "none"},
    "train_selfsup": {"location_weight": 1},
    "train_shot": {"strong_augment": "{jitter: {gamma: [0.7, 1.5]}, cutout: {}}"},
    "finetune": {},
}


def test_every_script_that_can_is_tried():
    scripts = {path.stem for path in TRAINING if not load_script(path).Config.one_process}
    assert {script for script, _ in CASES.values()} == scripts
    assert set(STREETS) == scripts - set(ONLY_CLASSIFICATION)


@pytest.fixture
def unequal_voids(monkeypatch):
    """The masks of the built-in street scenes are void in a part that differs between them."""
    open_street = segmentation.open_street

    def voided(name, train_split):
        images = open_street(name, train_split)
        labels = images.labels.clone()
        for number, mask in enumerate(labels):
            mask[: 7 * number % 60] = 255
        return dataclasses.replace(images, labels=labels)

    monkeypatch.setattr(segmentation, "open_street", voided)


@pytest.mark.parametrize(
    "script",
    others_slow(STREETS, ("train_dann", "train_mic")),
)
def test_two_processes_are_one_in_segmentation(tmp_path, script, unequal_voids):
    changes = {"model": FROZEN, "steps": 5, "eval_every": 2, **STREETS[script]}
    config = any_config(script, tmp_path, "segmentation", **changes)
    assert train(script, config, f"out_dir={tmp_path}/one") == 0
    train_on(2, script, config, f"out_dir={tmp_path}/two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    pictures = [
        (tmp_path / run / "pictures/step_00000005.png").read_bytes() for run in ("one", "two")
    ]
    assert pictures[0] == pictures[1]


# What a case of the tests above shares between the processes; "street": of the street scenes.
SHARED = [
    ("source", ranks, "average_gradients"),
    ("source", ranks, "total"),  # the confusion matrices
    ("source", counters, "total"),  # the label-free criteria
    ("source", ranks, "mean_over_ranks"),  # the log
    ("street", supervised, "mean_over_ranks"),
    ("dann_bounded", ranks, "norm_over_ranks"),
    ("cdan_e", cdan, "mean_over_ranks"),
    ("mmd", mmd, "gather"),
    ("coral", coral, "gather"),
    ("mcc", mcc, "mean_over_ranks"),
    ("advent", averages, "mean_over_ranks"),
    ("relative", pseudo_label, "mean_over_ranks"),
    ("class_balanced", pseudo_label, "total"),
    ("pseudo", collapse, "total"),
    ("pseudo", collapse, "mean_over_ranks"),
    ("shot", ranks, "total"),
    ("selfsup", contrastive, "gather"),
    ("aad", ranks, "gather"),  # the memory, and the images that an image is pushed from
    ("aad", ranks, "total"),  # the first pass over the target
]


@pytest.mark.parametrize(("case", "module", "name"), SHARED)
def test_control_alone_they_train_something_else(
    tmp_path, learned, case, module, name, unequal_voids
):
    """The tests above fail without what is shared."""
    script, changes = CASES.get(case, ("train_source", {"model": FROZEN}))
    task = "segmentation" if case == "street" else "classification"
    lines = {"model": PLAIN, "steps": 5, "eval_every": 5, "save_every": 5, **changes}
    lines |= {} if case in ("street", "shot", "aad") else {"init_from": learned}
    config = any_config(script, tmp_path, task, **lines)
    assert train(script, config, f"out_dir={tmp_path}/one") == 0
    local = (lambda x: x.detach().norm()) if name == "norm_over_ranks" else (lambda x, *others: x)

    def alone(number: int) -> None:
        setattr(module, name, local)

    processes = start_on(2, script, config, f"out_dir={tmp_path}/two", prepare=alone)
    if processes.wait() == [0, 0]:
        with pytest.raises(AssertionError):
            assert_equal_runs(tmp_path / "one", tmp_path / "two")
    else:
        assert "differs between the processes" in processes.printed(0)


# --- losses


def rows_of(*parts: torch.Tensor) -> list[torch.Tensor]:
    return [part[ranks.rows(len(part))] for part in parts]


def pseudo_labels(x, y, layer):
    log_p = layer(x).log_softmax(1)
    accepted = log_p.detach().exp().amax(1) > 0.3
    weights = pseudo_label.pseudo_label_weights(accepted, "confident_fraction")
    return pseudo_label.pseudo_label_loss(log_p, y, weights)


def bounded(x, y, layer):
    """The reversed gradient of one half of the features, bounded by the other's."""
    features = layer(x)
    (grad,) = torch.autograd.grad(features[:, :3].square().mean(), features, retain_graph=True)
    bound = 0.5 * ranks.norm_over_ranks(grad)
    return gradient_reversal(features, 1.0, bound).pow(3).mean()


LOSSES = {  # a loss of features or logits (N, 6), and what it shares between the processes
    "nll": (
        lambda x, y, layer: supervised.cross_entropy(layer(x), y.where(x[:, 0] > 0, 255), 0.1),
        [(supervised, "mean_over_ranks")],
    ),
    "diversity": (
        lambda x, y, layer: entropy.diversity_loss(layer(x).log_softmax(1)),
        [(averages, "mean_over_ranks")],
    ),
    "mcc": (lambda x, y, layer: mcc.mcc_loss(layer(x)), [(mcc, "mean_over_ranks")]),
    "cdan_e": (
        lambda x, y, layer: (cdan.entropy_weights(5 * layer(x)) * layer(x)[:, 0]).mean(),
        [(cdan, "mean_over_ranks")],
    ),
    "mmd": (lambda x, y, layer: mmd.mmd_loss(layer(x), layer(x + y[:, None])), [(mmd, "gather")]),
    "coral": (
        lambda x, y, layer: coral.coral_loss(layer(x), layer(x * y[:, None])),
        [(coral, "gather")],
    ),
    "nt_xent": (
        lambda x, y, layer: contrastive.nt_xent_loss(layer(x), layer(x + y[:, None])),
        [(contrastive, "gather")],
    ),
    "confident_fraction": (pseudo_labels, [(pseudo_label, "mean_over_ranks")]),
    "feature_distance": (
        lambda x, y, layer: feature_distance.feature_distance(
            layer(x)[..., None, None], torch.zeros(len(x), 6, 1, 1), y, [0, 1, 2]
        ),
        [(feature_distance, "mean_over_ranks")],
    ),
    "reversal_bound": (bounded, [(ranks, "total")]),
}


def write_gradient(name: str, file: Path, alone: bool = False) -> None:
    """Write the gradient of a loss of all rows.

    Args:
        name: of the loss.
        file: to write to.
        alone: whether nothing but the gradients is shared between the processes.
    """
    random = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 5, generator=random), torch.randint(0, 6, (12,), generator=random)
    torch.manual_seed(0)
    layer = nn.Linear(5, 6)
    ranks.join(60)
    loss, shared = LOSSES[name]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for module, function in shared if alone else ():
            patch.setattr(module, function, lambda x: x)
        loss(*rows_of(x, y), layer).backward()
    ranks.average_gradients(torch.optim.SGD(layer.parameters()))
    torch.save(layer.weight.grad, file)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_whole_batch(tmp_path, name):
    write_gradient(name, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")
    for alone in (False, True):  # the second is the control
        write = lambda number: write_gradient(name, tmp_path / f"{number}.pt", alone)  # noqa: B023, E731
        processes = Processes(3, write, tmp_path)
        assert processes.wait() == [0, 0, 0], processes.printed(0)
        parts = [torch.load(tmp_path / f"{number}.pt") for number in range(3)]
        assert torch.equal(parts[0], parts[1])
        difference = float((parts[0] - whole).abs().max() / whole.abs().max())
        assert difference > 1e-3 if alone else difference < 1e-6, difference


def test_gradients_of_any_layout_are_averaged_in_several_buckets(tmp_path):
    shapes = (3, 4, 2, 2), (5, 6), (1, 8, 1, 1), ()
    values = [1 + torch.arange(math.prod(shape)).float().reshape(shape) for shape in shapes]

    def average(number: int) -> None:
        ranks.BUCKET = 20
        ranks.join(60)
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value * (number + 1)
        parameters[0].grad = parameters[0].grad.contiguous(memory_format=torch.channels_last)
        parameters[1].grad = parameters[1].grad.t().contiguous().t()
        ranks.average_gradients(torch.optim.SGD(parameters))
        torch.save([p.grad for p in parameters], tmp_path / f"{number}.pt")

    processes = Processes(2, average, tmp_path)
    assert processes.wait() == [0, 0], processes.printed(0)
    for number in range(2):
        grads = torch.load(tmp_path / f"{number}.pt")
        assert all(torch.equal(g, 1.5 * v) for g, v in zip(grads, values, strict=True))
        assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert ranks.buckets([]) == []


# --- checkpoints and signals


def at_step(step: int, action: Callable[[], None]) -> None:
    """Do something in this process within a step of the next run."""
    add, seen = log.Log.add, []

    def add_and_act(self, **values):
        add(self, **values)
        seen.append(1)
        if len(seen) == step:
            action()

    log.Log.add = add_and_act


def send_itself(number: signal.Signals, *processes: int, step: int = 5) -> Callable[[int], None]:
    """For `prepare`: these processes get a signal within a step."""

    def prepare(process: int) -> None:
        if process in processes:
            at_step(step, lambda: os.kill(os.getpid(), number))

    return prepare


@pytest.fixture
def digits(tmp_path):
    """A config of DANN with batch norm and dropout, whose statistics and draws are of a process."""
    return any_config("train_dann", tmp_path, disc_norm="dropout", log_every=4)


def test_a_signal_to_one_process_stops_all_and_resuming_is_exact(tmp_path, digits):
    train_on(2, "train_dann", digits, f"out_dir={tmp_path}/through")
    stopped = start_on(2, "train_dann", digits, prepare=send_itself(signal.SIGTERM, 1))
    assert stopped.wait() == [143, 143]
    assert "stopped by SIGTERM after step 6" in stopped.printed(0)
    assert [file.name for file in (tmp_path / "run/checkpoints").glob("*.pt")] != []
    train_on(2, "train_dann", digits, "--resume")
    through, resumed = (
        torch.load(tmp_path / run / "checkpoints/step_00000010.pt", weights_only=True)
        for run in ("through", "run")
    )
    for name in ("model", "discriminators", "optimizer", "collapse", "log", "selected"):
        assert differing(through[name], resumed[name]) == 0, name
    lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("through", "run")]
    assert lines[0] == lines[1]


def test_control_without_the_sums_of_each_process_the_log_differs(tmp_path, digits):
    def forget(number: int) -> None:
        log.Log.load_state_dict = lambda self, state: None

    train_on(2, "train_dann", digits, f"out_dir={tmp_path}/through")
    start_on(2, "train_dann", digits, prepare=send_itself(signal.SIGTERM, 0, 1)).wait()
    train_on(2, "train_dann", digits, "--resume", prepare=forget)
    lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("through", "run")]
    assert lines[0] != lines[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(tmp_path, before, after):
    config = any_config("train_dann", tmp_path, model=PLAIN, disc_norm="none")
    train_on(1, "train_dann", config, f"out_dir={tmp_path}/through")
    every = send_itself(signal.SIGTERM, *range(before))
    assert start_on(before, "train_dann", config, prepare=every).wait() == [143] * before
    train_on(after, "train_dann", config, "--resume")
    assert (
        largest_difference(last_state(tmp_path / "through"), last_state(tmp_path / "run"))
        < ROUNDING
    )
    assert "was trained on" in (tmp_path / "process_0.log").read_text()


def test_each_process_has_noise_of_its_own_in_each_step(tmp_path, digits):
    def prepare(number: int) -> None:
        add = log.Log.add

        def add_and_write(self, **values):
            add(self, **values)
            with open(tmp_path / f"noise_{number}.txt", "a") as file:
                print(torch.initial_seed(), file=file)

        log.Log.add = add_and_write

    train_on(2, "train_dann", digits, prepare=prepare)
    seeds = [(tmp_path / f"noise_{number}.txt").read_text().split() for number in range(2)]
    assert [len(drawn) for drawn in seeds] == [10, 10]
    assert len({*seeds[0], *seeds[1]}) == 20


def test_the_first_process_of_a_machine_goes_first(tmp_path):
    def main(number: int) -> None:
        def download() -> str:
            time.sleep(0.3 if number == 0 else 0)
            with open(tmp_path / "order.txt", "a") as file:
                print(number, file=file)
            return f"of {number}"

        ranks.join(60)
        assert ranks.first_on_machine(download) == f"of {number}"

    processes = Processes(3, main, tmp_path)
    assert processes.wait() == [0, 0, 0], processes.printed(0)
    first, *others = (tmp_path / "order.txt").read_text().split()
    assert (first, sorted(others)) == ("0", ["1", "2"])


def test_processes_that_part_are_reported(tmp_path, digits):
    def part(number: int) -> None:
        ranks.average_gradients = lambda *arguments: None

    processes = start_on(2, "train_dann", digits, prepare=part)
    assert processes.wait() == [1, 1]
    errors = [line for i in (0, 1) for line in processes.printed(i).splitlines() if "error" in line]
    assert len(errors) == 1
    assert "differs between the processes; call average_gradients" in errors[0]


# --- faults


def errors_of(processes: Processes) -> list[str]:
    lines = [line for i in range(len(processes.pids)) for line in processes.printed(i).splitlines()]
    return [line for line in lines if line.startswith("error: ") or "Traceback" in line]


def test_a_loss_that_is_not_finite_on_one_process_ends_all(tmp_path, digits):
    def spoil(number: int) -> None:
        calls, cross_entropy = [], supervised.cross_entropy

        def spoiled(*arguments):
            calls.append(1)
            return cross_entropy(*arguments) * (math.nan if len(calls) == 5 else 1)

        if number == 1:
            supervised.cross_entropy = spoiled

    processes = start_on(2, "train_dann", digits, prepare=spoil)
    assert processes.wait() == [3, 3]
    (error,) = errors_of(processes)
    assert error.startswith("error: step 5: cls_loss is nan")
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_damaged_image_of_one_process_ends_all(tmp_path, pictures):
    pictures("photo", {"cat": 6, "dog": 6})
    art = pictures("art", {"cat": 8, "dog": 8})
    damaged = art / "dog" / "003.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    data = "{source: {name: folder, path: photo}, target: {name: folder, path: art}, size: 16,"
    data += f" batch: 4, root: {tmp_path}/images, cache: {tmp_path}/cache}}"
    config = any_config("train_dann", tmp_path, data=data)
    processes = start_on(2, "train_dann", config)
    assert processes.wait() == [2, 2]
    (error,) = errors_of(processes)
    assert str(damaged) in error
    assert str(damaged) in status(tmp_path / "run")["reason"]


@pytest.mark.parametrize("kind", ["killed", "stopped", "error"])
def test_the_end_of_one_process_ends_all(tmp_path, digits, kind):
    def fail() -> None:
        raise RuntimeError("the code is wrong")

    def prepare(number: int) -> None:
        ranks.WAIT = 0.5  # nobody tells a reason, unless at once
        if number == 1 and kind == "error":
            at_step(5, fail)
        elif number == 1:
            send_itself(signal.SIGKILL if kind == "killed" else signal.SIGSTOP, 1)(1)

    processes = start_on(2, "train_dann", digits, "process_timeout=3", prepare=prepare)
    codes = processes.wait(8)
    assert codes == [1, 1 if kind == "error" else -signal.SIGKILL]
    error = errors_of(processes)
    if kind == "error":
        assert "Traceback" in error[0]
        assert status(tmp_path / "run")["reason"] == "process 1: RuntimeError: the code is wrong"
    else:
        assert error == ["error: another process ended, or did not answer in time"]
        assert status(tmp_path / "run")["state"] == "failed"


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path, digits):
    processes = start_on(3, "train_dann", digits)
    assert processes.wait() == [2, 2, 2]
    (error,) = errors_of(processes)
    assert error.startswith("error: data.batch: 8 images cannot be shared out evenly among 3 proc")
    assert processes.printed(1) == processes.printed(2) == ""
    assert not (tmp_path / "run").exists()


def test_synchronized_batch_norm_needs_a_gpu(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    processes = start_on(2, "train_dann", digits, "model.bn_sync=true")
    assert processes.wait() == [2, 2]
    (error,) = errors_of(processes)
    assert "model.bn_sync: torch has synchronized batch norm on CUDA devices only" in error


@pytest.mark.parametrize("affine", ["train", "frozen"])
def test_synchronized_batch_norm_is_the_same_network(digits, monkeypatch, affine):
    """On a CPU it can be made, but not used."""
    keys = ["model.bn_sync=true", f"model.bn_affine={affine}"]
    config = load_run_config(load_script(ROOT / "train_dann.py").Config, [str(digits)], keys)
    classes = [str(number) for number in range(10)]
    networks = []
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        torch.manual_seed(0)
        networks.append(build_model(config, classes).train())
    plain, synchronized = networks
    kinds = [{type(m) for m in network.modules()} for network in networks]
    assert [nn.SyncBatchNorm in kind for kind in kinds] == [False, True]
    assert not kinds[1] & {nn.BatchNorm1d, nn.BatchNorm2d}
    assert differing(dict(plain.state_dict()), dict(synchronized.state_dict())) == 0
    trained = [[p.requires_grad for p in network.parameters()] for network in networks]
    assert trained[0] == trained[1]
    assert False in trained[0] if affine == "frozen" else False not in trained[0]
    statistics = [len(ranks.running_statistics((network,))) for network in networks]
    assert statistics[0] == statistics[1] > 0


def test_the_cache_of_decoded_images_is_shared(tmp_path, pictures):
    pictures("photo", {"cat": 6, "dog": 6})
    pictures("art", {"cat": 8, "dog": 8})
    data = "{source: {name: folder, path: photo}, target: {name: folder, path: art}, size: 16,"
    data += f" batch: 4, source_val: 2, root: {tmp_path}/images, cache: {tmp_path}/cache}}"
    config = any_config("train_source", tmp_path, data=data, model=PLAIN)
    train_on(2, "train_source", config, f"out_dir={tmp_path}/two")
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2  # one per set
    assert train("train_source", config, f"out_dir={tmp_path}/one", "data.workers=1") == 0
    assert largest_difference(last_state(tmp_path / "one"), last_state(tmp_path / "two")) < ROUNDING


def test_a_dry_run_writes_nothing(tmp_path, digits):
    processes = train_on(2, "train_dann", digits, "--dry-run")
    assert "dry run" in processes.printed(0)
    assert processes.printed(1) == ""
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused_once(digits):
    train_on(2, "train_dann", digits)
    processes = start_on(2, "train_dann", digits)
    assert processes.wait() == [2, 2]
    (error,) = errors_of(processes)
    assert "is used; add --resume" in error
    assert start_on(2, "train_dann", digits, "--resume").wait() == [0, 0]  # finished already


def test_a_signal_within_an_evaluation_stops_all(tmp_path, digits):
    def prepare(number: int) -> None:
        measure, seen = evaluation.confusion_matrix, []

        def stopped(*arguments):
            seen.append(1)
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(*arguments)

        if number == 1:
            evaluation.confusion_matrix = stopped

    train_on(2, "train_dann", digits, f"out_dir={tmp_path}/through")
    processes = start_on(2, "train_dann", digits, "data.eval_batch=10", prepare=prepare)
    assert processes.wait() == [143, 143]
    assert status(tmp_path / "run") == {
        **status(tmp_path / "through"),
        "state": "stopped",
        "step": 4,
    }
    train_on(2, "train_dann", digits, "data.eval_batch=10", "--resume")
    assert (
        largest_difference(last_state(tmp_path / "through"), last_state(tmp_path / "run"))
        < ROUNDING
    )


def test_a_signal_to_one_process_does_not_wait_for_a_pass_of_the_others(tmp_path, digits):
    """The other one would need longer for the evaluation than this one waits."""

    def prepare(number: int) -> None:
        measure, seen = evaluation.confusion_matrix, []

        def slow(*arguments):
            seen.append(1)
            if number == 1 and len(seen) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5 if number == 0 else 0)
            return measure(*arguments)

        evaluation.confusion_matrix = slow

    keys = "data.eval_batch=1", "process_timeout=3"
    processes = start_on(2, "train_dann", digits, *keys, prepare=prepare)
    assert processes.wait() == [143, 143], processes.printed(0)
    assert status(tmp_path / "run")["state"] == "stopped"


def test_a_signal_to_one_process_while_features_are_computed(tmp_path):
    config = any_config("finetune", tmp_path, feature_gb=0)

    def prepare(number: int) -> None:
        if number == 1:
            normalize, seen = Network.normalize, []

            def stopped(self, images):
                seen.append(1)
                if len(seen) == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return normalize(self, images)

            Network.normalize = stopped

    processes = start_on(2, "finetune", config, prepare=prepare)
    assert processes.wait() == [143, 143], processes.printed(0)


def test_a_mistake_of_one_process_is_told_by_it(tmp_path, digits):
    """Such as a machine with fewer GPUs than processes. torchrun then ends the others."""

    def prepare(number: int) -> None:
        def absent(name: str):
            raise UserError("device: there is no second GPU")

        if number == 1:
            device.get_device = absent
            for module in (run, training.config):
                module.get_device = absent

    processes = start_on(2, "train_dann", digits, "process_timeout=2", prepare=prepare)
    assert processes.wait() == [2, 2]
    assert errors_of(processes) == [
        "error: process 0 of 2 cannot meet the others (process 1 did not come within 2 s); "
        "start all of them by one torchrun command per machine (docs/run.md)",
        "error: process 1: device: there is no second GPU",
    ]


@pytest.mark.parametrize("key", ["eval_every=3", "seed=1", "data.size=32"])
def test_processes_of_different_commands_are_refused(tmp_path, digits, key):
    def main(number: int) -> int:
        words = ["--config", str(digits), *([key] if number == 1 else [])]
        return load_script(ROOT / "train_dann.py").main(words)

    processes = Processes(2, main, tmp_path)
    assert processes.wait() == [2, 2]
    (error,) = errors_of(processes)
    name, value = key.split("=")
    assert error.startswith(f"error: {name} differs between the processes (")
    assert f", {value}); start all of them by the same command" in error
    assert not (tmp_path / "run").exists()


def test_processes_of_different_images_are_refused(tmp_path, pictures):
    for name in ("photo", "art"):
        pictures(f"a/{name}", {"cat": 6, "dog": 6})
    shutil.copytree(tmp_path / "images/a", tmp_path / "images/b")
    (tmp_path / "images/b/art/dog/005.png").unlink()
    data = "{source: {name: folder, path: photo}, target: {name: folder, path: art}, size: 16,"
    data += f" batch: 4, root: {tmp_path}/images/a, cache: {tmp_path}/cache}}"
    config = any_config("train_dann", tmp_path, data=data)

    def main(number: int) -> int:
        root = f"data.root={tmp_path}/images/{'ab'[number]}"
        return load_script(ROOT / "train_dann.py").main(["--config", str(config), root])

    processes = Processes(2, main, tmp_path)
    assert processes.wait() == [2, 2]
    (error,) = errors_of(processes)
    assert error.startswith("error: data.target differs between the processes (")
