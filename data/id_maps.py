"""The meaning of the numbers in a mask: their class numbers, and the names of the classes.

`ids` of a domain is one of

    cityscapes
        the ids in the labelIds files of Cityscapes; 19 classes
    cityscapes16, cityscapes13
        the same ids; the 16 or 13 classes of SYNTHIA
    gta5
        the ids of GTA5, which are those of Cityscapes; 19 classes
    synthia16, synthia13
        the ids of SYNTHIA-RAND-CITYSCAPES; 16 or 13 classes. They are the first of three 16-bit
        channels in its GT/LABELS files; save that channel alone first.
    [sky, road, ...]
        masks contain class numbers: 0 is sky, 1 is road. 255 is ignored, and so is a class `void`.
    {sky: 0, road: [3, 4], void: [11, 255]}
        classes and their ids; the ids of `void` are ignored

A number in a mask that `ids` does not define is an error; it is never ignored silently.
"""

import difflib

import torch
from torchvision.datasets import Cityscapes

from common.errors import UserError
from common.metrics import IGNORE_INDEX

VOID = "void"
UNKNOWN = 254  # in a table: a number that `ids` does not define

_TRAIN = sorted((c for c in Cityscapes.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
_CITYSCAPES = {
    **{c.name: [c.id] for c in _TRAIN},
    VOID: [c.id for c in Cityscapes.classes if c.ignore_in_eval and c.id >= 0] + [IGNORE_INDEX],
}
_GTA5 = {**_CITYSCAPES, VOID: [*_CITYSCAPES[VOID], 34]}  # 34: license plate

# The ids of SYNTHIA-RAND-CITYSCAPES under the names of Cityscapes.
_SYNTHIA = {
    "road": 3, "sidewalk": 4, "building": 2, "wall": 21, "fence": 5, "pole": 7,
    "traffic light": 15, "traffic sign": 9, "vegetation": 6, "sky": 1, "person": 10, "rider": 17,
    "car": 8, "bus": 19, "motorcycle": 12, "bicycle": 11,
}  # fmt: skip
_SYNTHIA_REST = [0, 13, 14, 16, 18, 20, 22, IGNORE_INDEX]
_NOT_IN_13 = ("wall", "fence", "pole")


def _synthia(excluded: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """The ids of SYNTHIA for its classes without the excluded ones."""
    classes = {name: [number] for name, number in _SYNTHIA.items() if name not in excluded}
    return {**classes, VOID: [*_SYNTHIA_REST, *(_SYNTHIA[name] for name in excluded)]}


def _cityscapes(excluded: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """The ids of Cityscapes for the classes of SYNTHIA, in the order of SYNTHIA."""
    classes = {name: _CITYSCAPES[name] for name in _SYNTHIA if name not in excluded}
    rest = [number for name, ids in _CITYSCAPES.items() if name not in classes for number in ids]
    return {**classes, VOID: rest}


NAMED = {
    "cityscapes": _CITYSCAPES,
    "cityscapes16": _cityscapes(),
    "cityscapes13": _cityscapes(_NOT_IN_13),
    "gta5": _GTA5,
    "synthia16": _synthia(),
    "synthia13": _synthia(_NOT_IN_13),
}


def id_map(ids: str | list | dict, where: str) -> tuple[torch.Tensor, list[str]]:
    """The table and the class names of an `ids` of the config.

    Args:
        ids: one of the forms that this module describes.
        where: the key in the config, for messages.

    Returns:
        (table, names). table, uint8 (65536,), maps a number in a mask to its class number,
        `IGNORE_INDEX` or `UNKNOWN`.

    Raises:
        UserError: `ids` has none of the forms.
    """
    if isinstance(ids, str):
        if ids not in NAMED:
            near = difflib.get_close_matches(ids, NAMED, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMED)}"
            raise UserError(f"{where}: there are no ids named {ids!r}; {hint}")
        ids = NAMED[ids]
    elif isinstance(ids, list):
        if len(set(ids)) < len(ids):
            raise UserError(f"{where}: names a class twice")
        void = [number for number, name in enumerate(ids) if name == VOID]
        ids = {**{name: number for number, name in enumerate(ids)}, VOID: [*void, IGNORE_INDEX]}
    names = [name for name in ids if name != VOID]
    if not 2 <= len(names) < UNKNOWN:
        raise UserError(f"{where}: names {len(names)} classes; 2 to {UNKNOWN - 1} are possible")
    table = torch.full((2**16,), UNKNOWN, dtype=torch.uint8)
    for name, numbers in ids.items():
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if type(number) is not int or not 0 <= number < len(table):
                raise UserError(
                    f"{where}: {name}: {number!r} is not an id "
                    f"(an integer from 0 to {len(table) - 1})"
                )
            if table[number] != UNKNOWN:
                raise UserError(f"{where}: the id {number} belongs to two classes")
            table[number] = IGNORE_INDEX if name == VOID else names.index(name)
    return table, names
