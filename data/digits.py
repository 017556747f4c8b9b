"""Digit data sets: MNIST, USPS and SVHN of torchvision, and MNIST-M made as in the DANN paper."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision

from common.errors import UserError
from common.writing import write_atomically
from data.decoded import read_rgb
from data.image_set import ImageSet, image_set
from data.order import generator

CLASSES = [str(digit) for digit in range(10)]
CROP = 28  # px; side of an MNIST digit


def _open(name: str, folder: Path, present: bool, build: Callable):
    """A torchvision data set, downloaded if its files are missing.

    Args:
        name: of the data set, for messages.
        folder: of the files, for messages.
        present: whether the files are there.
        build: called with `download`.

    Raises:
        UserError: the files are damaged, or are missing and cannot be downloaded, or a package that
            torchvision needs is not installed.
    """
    try:
        return build(download=not present)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: torchvision reads it with {error.name}, which is not installed: "
            f"pip install {error.name}"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        state = "is damaged" if present else "is not there and could not be downloaded"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: {folder} {state} ({reason}); "
            "put the original files there or set data.root (or the variable DA_DATA)"
        ) from None


def _refuse_download(name: str, folder: Path, present: bool, read_only: bool) -> None:
    """Raise `UserError` if the files are missing and must not be downloaded (dry run)."""
    if read_only and not present:
        raise UserError(
            f"{name}: {folder} is not there; "
            "put the files there; a run without --dry-run downloads them"
        )


def mnist(root: Path, train: bool, read_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """60,000 training or 10,000 test digits in root/MNIST: uint8 (N, 1, 28, 28), labels (N,)."""
    folder = root / "MNIST" / "raw"
    present = folder.is_dir() and any(folder.iterdir())
    _refuse_download("mnist", folder, present, read_only)
    data = _open(
        "mnist",
        folder,
        present,
        lambda download: torchvision.datasets.MNIST(root, train=train, download=download),
    )
    return data.data.unsqueeze(1), data.targets


def usps(root: Path, train: bool, read_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """7,291 training or 2,007 test digits in root/USPS: uint8 (N, 1, 16, 16), labels (N,)."""
    folder = root / "USPS"
    present = (folder / ("usps.bz2" if train else "usps.t.bz2")).is_file()
    _refuse_download("usps", folder, present, read_only)
    data = _open(
        "usps",
        folder,
        present,
        lambda download: torchvision.datasets.USPS(folder, train=train, download=download),
    )
    return torch.from_numpy(data.data).unsqueeze(1), torch.as_tensor(data.targets)


def svhn(root: Path, train: bool, read_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """73,257 training or 26,032 test digits in root/SVHN: uint8 (N, 3, 32, 32), labels (N,).

    They are digits of house numbers. torchvision reads them with scipy.
    """
    folder = root / "SVHN"
    split = "train" if train else "test"
    present = (folder / f"{split}_32x32.mat").is_file()
    _refuse_download("svhn", folder, present, read_only)
    data = _open(
        "svhn",
        folder,
        present,
        lambda download: torchvision.datasets.SVHN(folder, split=split, download=download),
    )
    return torch.from_numpy(data.data), torch.as_tensor(data.labels)


def blend(
    digits: torch.Tensor, photographs: list[np.ndarray], random: torch.Generator
) -> torch.Tensor:
    """Digits of MNIST-M: |patch - digit| per channel (Ganin et al. 2016, section 5.2.4).

    Args:
        digits: uint8 (N, 1, 28, 28).
        photographs: uint8 (H, W, 3) each, of at least 28 px.
        random: chooses a photograph and a patch of it per digit.

    Returns:
        uint8 (N, 3, 28, 28).
    """
    blended = np.empty((len(digits), CROP, CROP, 3), np.uint8)
    which = torch.randint(len(photographs), (len(digits),), generator=random).tolist()
    corner = torch.rand((len(digits), 2), generator=random).tolist()
    gray = digits[:, 0].numpy()
    for i, (number, (down, across)) in enumerate(zip(which, corner, strict=True)):
        photograph = photographs[number]
        top = int(down * (photograph.shape[0] - CROP + 1))
        left = int(across * (photograph.shape[1] - CROP + 1))
        patch = photograph[top : top + CROP, left : left + CROP].astype(np.int16)
        blended[i] = np.abs(patch - gray[i, :, :, None])
    return torch.from_numpy(blended).permute(0, 3, 1, 2).contiguous()


def mnistm(
    root: Path, path: str, train: bool, cache: Path, read_only: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST-M, which does not depend on the seed of a run: uint8 (N, 3, 28, 28), labels (N,).

    Args:
        root: the folder of all data sets, with MNIST in it.
        path: the folder of photographs, below `root`.
        train: the training split, or the test split.
        cache: the folder that stores the result.
        read_only: store and download nothing (dry run).

    Raises:
        UserError: MNIST or the photographs are missing, or a photograph is too small.
    """
    digits, labels = mnist(root, train, read_only)
    files = sorted(
        p for p in (root / path).glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    if not files:
        raise UserError(
            f"mnistm: no photographs in {root / path}; set path to a folder of jpg or png files"
        )
    split = "train" if train else "test"
    random = generator("mnistm", split, *(f"{p.name}:{p.stat().st_size}" for p in files))
    stored = cache / f"mnistm_{split}_{random.initial_seed():016x}.npy"
    if stored.is_file():
        try:
            images = torch.from_numpy(np.load(stored))
            if images.shape == (len(digits), 3, CROP, CROP):
                return images, labels
        except (ValueError, OSError, EOFError):
            pass  # an incomplete file is made again
    photographs = [np.asarray(read_rgb(p)) for p in files]
    small = [p for p, image in zip(files, photographs, strict=True) if min(image.shape[:2]) < CROP]
    if small:
        raise UserError(f"mnistm: {small[0]} is smaller than {CROP} px; remove it")
    images = blend(digits, photographs, random)
    if not read_only:
        write_atomically(stored, lambda file: np.save(file, images.numpy()))
    return images, labels


def open_digits(
    name: str, path: str | None, root: Path, train: bool, cache: Path, read_only: bool
) -> ImageSet:
    """A digit data set.

    Args:
        name: mnist, usps, svhn or mnistm.
        path: mnistm: the folder of photographs, below `root`.
        root: the folder of all data sets.
        train: the training split, or the test split.
        cache: mnistm: the folder that stores the result.
        read_only: store and download nothing (dry run).
    """
    if name == "mnistm":
        images, labels = mnistm(root, path, train, cache, read_only)
    else:
        images, labels = {"mnist": mnist, "usps": usps, "svhn": svhn}[name](root, train, read_only)
    return image_set(name, images, labels, CLASSES)
