"""What the numbers in a mask mean: a table from them to class numbers, and the names of the classes.

`ids` of a domain is one of

    cityscapes            19 classes from the ids of Cityscapes' labelIds files; cityscapes16, cityscapes13: SYNTHIA's
    gta5                  19 classes from the ids of GTA5, which are those of Cityscapes
    synthia16, synthia13  from the ids of SYNTHIA-RAND-CITYSCAPES, the first channel of its GT/LABELS files, which have
                          three of 16 bits and must be saved with this one alone first
    [sky, road, ...]      masks hold class numbers: 0 is sky, 1 road; 255 is ignored, and what is called `void`
    {sky: 0, road: [3, 4], void: [11, 255]}   a class and its ids; what stands under `void` is ignored

A number that a mask holds and the map has not is an error, never ignored in silence.
"""

import difflib

import torch
from torchvision.datasets import Cityscapes

from common.evaluation import IGNORE_INDEX
from common.runtime import UserError

VOID = "void"
UNKNOWN = 254  # in a table: a number that has no meaning

_TRAIN = sorted((c for c in Cityscapes.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
_CITYSCAPES = {
    **{c.name: [c.id] for c in _TRAIN},
    VOID: [c.id for c in Cityscapes.classes if c.ignore_in_eval and c.id >= 0] + [IGNORE_INDEX],
}
_GTA5 = {**_CITYSCAPES, VOID: [*_CITYSCAPES[VOID], 34]}  # its licence plate

# the ids of SYNTHIA-RAND-CITYSCAPES under the names of Cityscapes; 0 is void
_SYNTHIA = {
    "road": 3, "sidewalk": 4, "building": 2, "wall": 21, "fence": 5, "pole": 7, "traffic light": 15, "traffic sign": 9,
    "vegetation": 6, "sky": 1, "person": 10, "rider": 17, "car": 8, "bus": 19, "motorcycle": 12, "bicycle": 11,
}  # fmt: skip
_SYNTHIA_REST = [0, 13, 14, 16, 18, 20, 22, IGNORE_INDEX]
_NOT_IN_13 = ("wall", "fence", "pole")


def _synthia(left_out: tuple[str, ...] = ()) -> dict[str, list[int]]:
    kept = {name: [number] for name, number in _SYNTHIA.items() if name not in left_out}
    return {**kept, VOID: [*_SYNTHIA_REST, *(_SYNTHIA[name] for name in left_out)]}


def _cityscapes(left_out: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Cityscapes' ids for SYNTHIA's classes, in SYNTHIA's order."""
    kept = {name: _CITYSCAPES[name] for name in _SYNTHIA if name not in left_out}
    rest = [number for name, ids in _CITYSCAPES.items() if name not in kept for number in ids]
    return {**kept, VOID: rest}


NAMED = {
    "cityscapes": _CITYSCAPES,
    "cityscapes16": _cityscapes(),
    "cityscapes13": _cityscapes(_NOT_IN_13),
    "gta5": _GTA5,
    "synthia16": _synthia(),
    "synthia13": _synthia(_NOT_IN_13),
}


def id_map(ids: str | list | dict, where: str) -> tuple[torch.Tensor, list[str]]:
    """(table, class names): table[number in the mask] is a class number, `IGNORE_INDEX` or `UNKNOWN`; uint8 (65536,).

    Raises `UserError`, beginning with `where`, for an `ids` that is none of the forms of this module.
    """
    if isinstance(ids, str):
        if ids not in NAMED:
            near = difflib.get_close_matches(ids, NAMED, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMED)}"
            raise UserError(f"{where}: no map {ids!r}; {hint}")
        ids = NAMED[ids]
    elif isinstance(ids, list):
        if len(set(ids)) < len(ids):
            raise UserError(f"{where}: names a class twice")
        void = [number for number, name in enumerate(ids) if name == VOID]
        ids = {**{name: number for number, name in enumerate(ids)}, VOID: [*void, IGNORE_INDEX]}
    names = [name for name in ids if name != VOID]
    if not 2 <= len(names) < UNKNOWN:
        raise UserError(f"{where}: names {len(names)} classes, 2 to {UNKNOWN - 1} are possible")
    table = torch.full((2**16,), UNKNOWN, dtype=torch.uint8)
    for name, numbers in ids.items():
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if type(number) is not int or not 0 <= number < len(table):
                raise UserError(f"{where}: {name}: {number!r} is no id (an integer from 0 to {len(table) - 1})")
            if table[number] != UNKNOWN:
                raise UserError(f"{where}: the id {number} stands under two names")
            table[number] = IGNORE_INDEX if name == VOID else names.index(name)
    return table, names
