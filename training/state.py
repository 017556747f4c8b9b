"""A check that everything with a state is saved."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from common import ranks
from common.errors import UserError
from common.transfer import read

# What a run saves of its own, by name.
OWN_STATE = {"log", "step", "history", "selected", "seconds", "commits"}
OWN_STATE |= {"evaluation_due", "config", "changes", "classes", "fingerprints", "machines"}
OWN_STATE |= {"collapse", "start_sha256"}
# Named `predictions` in older checkpoints, whose sample of images was another one per seed.
OWN_STATE |= {"sampled_predictions"}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def _parts(value) -> Iterator:
    """The value, or the values in a list, tuple or dict."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield value


def _tensors(value, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of every floating tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _named_tensors(state: dict) -> dict[str, torch.Tensor]:
    """The floating tensors of all objects by a phrase such as "the model's head.weight"."""
    return {
        f"the {name}'s {part}": tensor
        for name, value in state.items()
        for part, tensor in ([] if value is None else _tensors(value.state_dict(), ""))
    }


def first_not_finite(state: dict) -> str | None:
    """What is not finite in the first object that is to be saved and has learned such a number.

    Args:
        state: the objects that are saved, by name; None for one that a config leaves out.

    Returns:
        A phrase such as "the model's head.weight", or None if every number is finite.
    """
    named = _named_tensors(state)
    finite: dict[str, torch.Tensor] = {name: x.isfinite().all() for name, x in named.items()}
    # One wait for the device, whatever the number of tensors.
    flags = zip(finite, read(list(finite.values())), strict=True)
    return next((name for name, flag in flags if not flag), None)


def first_that_differs(state: dict) -> str | None:
    """What differs between the processes, which must all hold the same.

    Args:
        state: as for `first_not_finite`.

    Returns:
        A phrase such as "the model's head.weight", or None if all are equal in every bit.
    """
    if ranks.count() == 1:
        return None
    names, tensors = zip(*_named_tensors(state).items(), strict=True)
    device = max(tensors, key=lambda tensor: tensor.is_cuda).device
    bits = (x.detach().contiguous().view(-1).view(BITS[x.element_size()]) for x in tensors)
    sums = torch.stack([x.sum(dtype=torch.int64).to(device, non_blocking=True) for x in bits])
    different = (ranks.most(sums) != -ranks.most(-sums)).tolist()
    return names[different.index(True)] if any(different) else None


def _tensor_ids(value) -> set[int]:
    """The identities of a module's parameters and buffers."""
    if not isinstance(value, nn.Module):
        return set()
    return {id(tensor) for tensor in (*value.parameters(), *value.buffers())}


def _all_ids(value) -> set[int]:
    """The identities of a value, and of all modules and tensors in it."""
    modules = {id(part) for part in value.modules()} if isinstance(value, nn.Module) else set()
    return {id(value)} | modules | _tensor_ids(value)


def check_state(state: dict, variables: dict) -> None:
    """Raise `UserError` where something that learns or remembers is missing from `state`.

    A state that is not saved is lost silently on --resume. The check covers the variables of the
    script and the items of its lists, tuples and dicts, if they have a `state_dict` that is not
    empty, and the parameters that a saved optimizer trains. It does not cover plain tensors,
    numbers, and attributes of other objects: store what changes in a buffer of a module.

    Args:
        state: the objects that are saved, by name; None for one that a config leaves out.
        variables: the variables of the script, by name.
    """
    for name, value in state.items():
        if name in OWN_STATE:
            raise UserError(f"run.begin: the run saves its own {name}; choose another name")
        if value is not None and not _has_state(value):
            raise UserError(
                f"run.begin: {name} ({type(value).__name__}) has no state_dict and "
                "load_state_dict, and would not be restored; put tensors into a buffer of an "
                "nn.Module, and modules of a list into an nn.ModuleList"
            )
    saved = set().union(*map(_all_ids, state.values()))
    for name, variable in variables.items():
        for part in _parts(variable):
            if isinstance(part, type) or not _has_state(part) or id(part) in saved:
                continue
            tensors = _tensor_ids(part)
            if tensors and tensors <= saved:  # another name, such as a compiled model's
                continue
            if part.state_dict():
                remedy = f"add {name}={name} to run.begin"
                if variable is not part:
                    remedy = f"make {name} an nn.ModuleList, or name what it contains, in run.begin"
                raise UserError(
                    f"run.begin: {name} ({type(part).__name__}) has a state that is not saved and "
                    f"would be lost on --resume; {remedy}"
                )
    for name, value in state.items():
        groups = value.param_groups if isinstance(value, Optimizer) else []
        if any(id(p) not in saved for group in groups for p in group["params"]):
            raise UserError(
                f"run.begin: {name} trains a parameter of no module that is saved; put it into an "
                "nn.Module and name that module in run.begin"
            )


def _has_state(value) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
