"""What may change between a run and its continuation, and what has changed."""

import dataclasses
from pathlib import Path

from common.config import Hints, all_keys, build, changed_keys, flat_values
from common.errors import UserError
from training.free_keys import FREE_AT_RESUME


def is_rate(key: str) -> bool:
    """Whether a key sets a learning rate: its last word is `lr`, or ends with _lr or lr_scale."""
    word = key.rsplit(".", 1)[-1]
    return word == "lr" or word.endswith(("_lr", "lr_scale"))


def may_change(key: str) -> bool:
    """Whether --allow-change accepts another value: it does not alter what the network is."""
    return is_rate(key) or key in ("steps", "eval_every", "amp")


def check_changes(before, now, allow: bool, folder: Path) -> dict[str, tuple]:
    """{key: (before, now)} of the keys that --allow-change has changed.

    Args:
        before: the config of the run.
        now: the config of its continuation.
        allow: whether --allow-change is given.
        folder: the run folder, for messages.

    Raises:
        UserError: a key has changed that may not.
    """
    changed = changed_keys(before, now, FREE_AT_RESUME)
    refused = [key for key in changed if not may_change(key)]
    if not refused and (allow or not changed):
        return changed
    if not refused:
        remedy = "undo the change, add --allow-change to go on under the new config,"
    elif allow:
        remedy = f"undo the change of {', '.join(refused)}, which --allow-change does not accept,"
    else:
        remedy = "undo the change"
    shown = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
    raise UserError(
        f"--resume: {folder} was trained under another config ({shown}); "
        f"{remedy} or choose another out_dir"
    )


def _place(tree: dict, key: str) -> tuple[dict, str]:
    """(the section of a dotted key in a tree, its last word)."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    return tree, name


def config_tree(config) -> dict:
    """The config as a checkpoint keeps it: plain values, without the keys that are free."""
    tree = dataclasses.asdict(config)
    for key in FREE_AT_RESUME:
        section, name = _place(tree, key)
        del section[name]
    return tree


def config_of(tree: dict, now, file: Path):
    """The config of a checkpoint, whose free keys have the values of this run.

    Args:
        tree: of `config_tree`.
        now: the config of this run.
        file: the checkpoint, for messages.

    Raises:
        UserError: (code 4) the script has other keys by now.
    """
    values, mistakes = flat_values(now), []
    for key in FREE_AT_RESUME:
        section, name = _place(tree, key)
        section[name] = values[key]
    before = build(type(now), tree, Hints(all_keys(type(now))), mistakes)
    if mistakes:
        raise UserError(f"{file}: was written by another script or version ({mistakes[0]})", 4)
    return before
