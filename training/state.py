"""A check that everything with a state is saved."""

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from common.errors import UserError


def _parts(value) -> Iterator:
    """The value, or the values in a list, tuple or dict."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield value


def check_state(state: dict, variables: dict) -> None:
    """Raise `UserError` if something that learns or remembers is missing from `state`.

    A state that is not saved is lost silently on --resume. The check covers the variables of the
    script and the items of its lists, tuples and dicts, if they have a `state_dict` that is not
    empty, and the parameters that a saved optimizer trains. It does not cover plain tensors and
    numbers: store those that change in a buffer of a module.

    Args:
        state: the objects and values that are saved, by name.
        variables: the variables of the script, by name.
    """
    saved_ids = {id(value) for value in state.values()}
    parameter_ids = set()
    for value in state.values():
        if isinstance(value, nn.Module):
            saved_ids |= {id(module) for module in value.modules()}
            parameter_ids |= {id(parameter) for parameter in value.parameters()}
    for name, variable in variables.items():
        for part in _parts(variable):
            stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
            if isinstance(part, type) or not stateful or id(part) in saved_ids:
                continue
            if part.state_dict():
                remedy = f"add {name}={name} to run.begin"
                if variable is not part:
                    remedy = f"make {name} an nn.ModuleList, or name what it contains, in run.begin"
                raise UserError(
                    f"run.begin: {name} ({type(part).__name__}) has a state that would be lost on "
                    f"--resume; {remedy}"
                )
    for name, value in state.items():
        groups = value.param_groups if isinstance(value, Optimizer) else []
        if any(id(p) not in parameter_ids for group in groups for p in group["params"]):
            raise UserError(
                f"run.begin: {name} trains a parameter of no module that is saved; put it into an "
                "nn.Module and name that module in run.begin"
            )
