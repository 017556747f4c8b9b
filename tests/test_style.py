"""Source images in the style of target images, `data.fda`."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import open_domains
from data.style import fourier_style
from tests.helpers import (
    ROOT,
    TASKS,
    batches_in_pieces,
    config_of,
    differing,
    load_script,
    train,
    weights,
)
from tests.test_operations import photographs
from training.config import load_run_config


def plain(image: np.ndarray, style: np.ndarray, share: float) -> np.ndarray:
    """One image (C, H, W), by all frequencies, as the authors' FDA_source_to_target_np does it."""
    spectrum = np.fft.fftshift(np.fft.fft2(image), axes=(-2, -1))
    other = np.fft.fftshift(np.fft.fft2(style), axes=(-2, -1))
    amplitude = np.abs(spectrum)
    height, width = image.shape[-2:]
    most = int(np.floor(min(height, width) * share))
    row, column = height // 2, width // 2
    rows, columns = slice(row - most, row + most + 1), slice(column - most, column + most + 1)
    amplitude[:, rows, columns] = np.abs(other)[:, rows, columns]
    styled = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(spectrum)), (-2, -1)))
    return styled.real.round().clip(0, 255)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 45), (40, 27)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3])
def test_as_a_plain_version(height, width, share):
    images = photographs(6)[:, :, :height, :width]
    images, styles = images[:3], images[3:]
    styled = fourier_style(images, styles, share)
    assert styled.dtype == torch.uint8
    for i in range(3):
        expected = plain(images[i].double().numpy(), styles[i].double().numpy(), share)
        assert np.abs(styled[i].numpy() - expected).max() <= 1  # 1 where rounding is a tie
    assert (styled != images).any()


def test_the_mean_color_alone():
    images, styles = photographs(2).split(1)
    images, styles = images // 4 + 96, styles // 4 + 96  # nothing is clipped
    styled = fourier_style(images, styles, 0.0).float()
    difference = styled.mean((2, 3)) - styles.float().mean((2, 3))
    assert difference.abs().max() <= 0.5  # a level is rounded
    change = styled - images.float()
    assert (change - change.mean((2, 3), keepdim=True)).abs().max() <= 1


def test_no_image_sizes_and_channels():
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert fourier_style(empty, empty, 0.1).shape == (0, 3, 8, 8)
    gray, color = photographs(2)[:, :1, :20, :30], photographs(2)
    assert fourier_style(gray, color, 0.1).shape == (2, 3, 20, 30)
    assert fourier_style(gray, color[:, :1], 0.1).shape == (2, 1, 20, 30)
    same = fourier_style(color, color, 0.5).int() - color.int()
    assert same.abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("task", TASKS)
def test_the_style_is_that_of_the_target_batch(tmp_path, task, workers):
    """Without augmentation; the labels are those of the source."""
    file = config_of(task, tmp_path, "train_source")
    keys = ["data.augment={}", f"data.workers={workers}", "data.fda=0.1"]
    config = load_run_config(load_script(ROOT / "train_source.py").Config, [file], keys).data
    config.source.augment = config.target.augment = {}
    domains = open_domains(config, 3)
    styled = list(domains.batches("source", 1, 4))
    config.fda = None
    plain_batches = list(domains.batches("source", 1, 4))
    targets = list(domains.batches("target", 1, 4))
    for (x, y), (x_s, y_s), x_t in zip(styled, plain_batches, targets, strict=True):
        assert torch.equal(y, y_s)
        assert torch.equal(x, fourier_style(x_s, x_t, 0.1))
        assert not torch.equal(x, fourier_style(x_s, x_t.roll(1, 0), 0.1))  # control


def test_processes_and_parts_take_the_styles_of_their_rows(tmp_path, monkeypatch):
    file = config_of("classification", tmp_path, "train_source")
    keys = ["data.fda=0.1"]
    config = load_run_config(load_script(ROOT / "train_source.py").Config, [file], keys).data
    pieces = batches_in_pieces(open_domains(config, 3), "source", 3, monkeypatch)
    for step, whole in enumerate(pieces["whole"]):
        assert torch.equal(whole, pieces["processes"][step])
        assert torch.equal(whole, pieces["parts"][step])


@pytest.mark.parametrize("script", ["train_source", "train_dann"])
def test_styled_source_images_train_another_network(tmp_path, script):
    config = config_of("classification", tmp_path, script)
    for fda in ("null", "0.05"):
        keys = [f"data.fda={fda}", "steps=3", f"out_dir={tmp_path}/{fda}"]
        assert train(script, config, *keys) == 0
    assert differing(weights(tmp_path / "null"), weights(tmp_path / "0.05")) > 1000


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["data.fda=0.6"], "data.fda must be at most 0.5"),
        (["data.fda=-0.1"], "data.fda must"),
        (["data.fda=0.1", "data.target_batch=4"], "data.target_batch: fda pairs equal numbers"),
    ],
)
def test_values_that_are_refused(tmp_path, keys, match):
    file = config_of("classification", tmp_path, "train_source")
    with pytest.raises(UserError, match=match):
        load_run_config(load_script(ROOT / "train_source.py").Config, [file], keys)


def test_a_method_without_source_images_has_no_style(tmp_path):
    keys = ["data.source=null", "init_from=runs/a", "data.fda=0.1"]
    file = config_of("classification", tmp_path, "train_source")
    with pytest.raises(UserError, match="fda changes source images, which this method does not"):
        load_run_config(load_script(ROOT / "train_shot.py").Config, [file], keys)
