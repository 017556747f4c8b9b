"""Everything with a state is saved, or `run.begin` refuses to start."""

import argparse
import math
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from common.averages import EMATeacher, RunningMean
from common.errors import UserError
from tests.helpers import tiny_config
from train_source import Config
from training.config import load_run_config
from training.run import Run
from training.state import check_state, first_not_finite


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)


def scaler(enabled: bool) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=enabled)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


FORGOTTEN = {
    "discriminator": lambda: nn.Linear(2, 1),
    "optimizer": lambda: sgd(nn.Linear(2, 1)),
    "discriminators": lambda: [nn.Linear(2, 1), nn.Linear(2, 1)],
    "by_layer": lambda: {"layer4": (nn.ReLU(), nn.Linear(2, 1))},
    "scaler": lambda: scaler(enabled=True),
    "monitor": lambda: RunningMean(torch.zeros(2), 0.9),  # buffers, no parameter
    "teacher": lambda: EMATeacher(nn.Linear(2, 1), 0.9, copy_buffers=False),
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(sgd(nn.Linear(2, 1)), 3),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_is_forgotten_is_named(model, name):
    variable = FORGOTTEN[name]()
    saved = {"model": model, "optimizer": sgd(model)}
    match = rf"run\.begin: {name} \(\w+\) has a state .* {name}.* run\.begin"
    with pytest.raises(UserError, match=match) as caught:
        check_state(saved, {**saved, name: variable})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["discriminator", "scaler", "monitor", "teacher", "scheduler"])
def test_what_is_saved_passes(model, name):
    saved = {"model": model, "optimizer": sgd(model), name: FORGOTTEN[name]()}
    check_state(saved, dict(saved))


def test_a_list_of_modules_is_saved_as_a_module_list(model):
    discriminators = [nn.Linear(2, 1), nn.Linear(2, 1)]
    saved = {"model": model, "discriminators": nn.ModuleList(discriminators)}
    check_state(saved, {**saved, "each": discriminators, "first": discriminators[0]})
    with pytest.raises(UserError, match="each"):  # control: a plain list would not be saved
        check_state({"model": model, "each": discriminators}, {"each": discriminators})


def test_children_of_a_saved_module_pass(model):
    variables = {
        "model": model,
        "last": model[2],
        "layers": list(model),
        "by_name": dict(model.named_children()),
        "again": model,
    }
    check_state({"model": model}, variables)
    with pytest.raises(UserError, match=r"run\.begin: model \(Sequential\)"):  # control
        check_state({"last": model[2]}, {"model": model, "last": model[2]})


def test_what_has_no_state_passes(model):
    variables = {
        "activation": nn.ReLU(),
        "disabled": scaler(enabled=False),
        "nothing": None,
        "kind": nn.Linear,
        "tensor": torch.zeros(3),
        "number": 3,
        "names": ["a", "b"],
        "values": {"a": 1.0},
        "autocast": torch.autocast("cpu", enabled=False),
    }
    check_state({"model": model, "teacher": None}, {"model": model, **variables})


def test_a_bare_parameter_in_an_optimizer_is_refused(model):
    shares = nn.Parameter(torch.zeros(3))
    parameters = [*model.parameters(), shares]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    saved = {"model": model, "optimizer": optimizer}
    with pytest.raises(UserError, match=r"run\.begin: optimizer trains a parameter of no module"):
        check_state(saved, {**saved, "shares": shares})
    module = nn.ParameterList([shares])
    check_state({**saved, "shares": module}, {**saved, "shares": shares})


def test_an_optimizer_of_a_module_that_is_not_saved_is_refused(model):
    saved = {"model": model, "optimizer": sgd(model, nn.Linear(2, 1))}
    with pytest.raises(UserError, match=r"run\.begin: optimizer trains a parameter of no module"):
        check_state(saved, dict(saved))
    check_state({"model": model, "optimizer": sgd(model[0])}, {"model": model})  # control


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    config = load_run_config(Config, str(tiny_config(tmp_path)))
    yield Run(
        config, argparse.Namespace(resume=False, dry_run=False, all=False, command="python x.py")
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_begin_looks_at_the_variables_of_its_caller(run, tmp_path):
    """And refuses before anything is written."""
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    discriminator = nn.Linear(2, 1)
    with pytest.raises(UserError, match=r"run\.begin: discriminator \(Linear\) has a state"):
        run.begin(model=model, optimizer=optimizer)
    assert not (tmp_path / "run").exists()
    run.open_domains()
    assert run.begin(model=model, optimizer=optimizer, discriminator=discriminator) == 0
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_begin_without_a_model_is_a_type_error(run, tmp_path):
    with pytest.raises(TypeError, match="model"):
        run.begin(optimizer=sgd(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="positional"):
        run.begin(nn.Linear(3, 2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["log", "step", "history", "selected", "seconds", "commits"])
def test_a_name_of_the_run_itself_is_refused(model, name):
    with pytest.raises(UserError, match=f"the run saves its own {name}"):
        check_state({"model": model, name: nn.Linear(2, 1)}, {})


@pytest.mark.parametrize("value", [torch.ones(3), [nn.Linear(2, 1)], 0.5], ids=lambda v: type(v))
def test_what_could_not_be_restored_is_refused(model, value):
    with pytest.raises(UserError, match=r"extra \(\w+\) has no state_dict .* buffer"):
        check_state({"model": model, "extra": value}, {})
    check_state({"model": model, "extra": None}, {})  # control: a teacher that a config leaves out


def test_other_names_of_the_same_tensors_pass(model):
    """A compiled or wrapped model holds the parameters that are saved."""
    variables = {"wrapped": nn.ModuleList([model]), "parts": [model[0], model[2]]}
    check_state({"model": model}, variables)
    with pytest.raises(UserError, match="wrapped"):  # control: one layer more
        check_state({"model": model}, {"wrapped": nn.ModuleList([model, nn.Linear(2, 2)])})


class Remembers(nn.Module):
    """A module whose state is no tensor."""

    def get_extra_state(self) -> dict:
        return {"alarms": []}

    def set_extra_state(self, state: dict) -> None:
        pass


def test_a_state_that_is_no_tensor_is_seen(model):
    with pytest.raises(UserError, match="monitor"):
        check_state({"model": model}, {"monitor": Remembers()})
    monitor = Remembers()
    check_state({"model": model, "monitor": monitor}, {"monitor": monitor})  # control


def test_the_first_number_that_is_not_finite_is_named(model):
    statistics = nn.Module()
    statistics.register_buffer("counts", torch.tensor([1, 2]))  # whole numbers always are
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model, "teacher": None, "statistics": statistics, "optimizer": optimizer}
    state["scaler"] = scaler(enabled=False)
    assert first_not_finite(state) is None
    parameter = next(iter(optimizer.state))
    optimizer.state[parameter]["exp_avg"][-1] = math.inf
    assert first_not_finite(state) == "the optimizer's state.0.exp_avg"
    model[0].bias.data[0] = math.nan
    assert first_not_finite(state) == "the model's 0.bias"
