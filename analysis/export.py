"""A model in one file, with the preparation of images inside: torch.export and ONNX."""

import io
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from common.errors import UserError
from common.optional import optional
from common.resize import resize_maps
from common.writing import write_atomically
from models import ModelCard, Network
from models.backbones import has_windows
from models.card import CARD

TOLERANCE = 1e-4  # of the logits, between the exported program and the network
BATCHES = (1, 3)  # that are compared
LEAST = 64  # px of a side of the smallest images; a last map of one value is a case apart


class Deployed(nn.Module):
    """uint8 images (N, 3, H, W) of one size, sides of `LEAST` px or more, in RGB -> logits float32.

    Logits are (N, K), or of a segmenter (N, K, H, W). Images are resized with antialiasing, rounded
    to whole numbers and cropped, as `data.load_image` does with a file, up to one gray level in
    some pixels.

    Args:
        network: in eval mode.
        card: how images are prepared.
    """

    def __init__(self, network: Network, card: ModelCard):
        super().__init__()
        self.network, self.size = network, card.size
        both = [card.resize, card.resize]
        self.resize = both if isinstance(card.resize, int) else card.resize

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()
        if self.resize is not None:
            x = nn.functional.interpolate(x, self.resize, mode="bilinear", antialias=True)
            x = x.round().clamp(0, 255)
        if self.size is None:
            logits = self.network(x).logits
            return logits if self.resize is None else resize_maps(logits, images.shape[2:])
        side = self.resize[0]
        if side < self.size:  # as torchvision's center_crop pads
            before = (self.size - side) // 2
            after = self.size - side - before
            x = nn.functional.pad(x, [before, after, before, after])
        elif side > self.size:
            first = round((side - self.size) / 2)
            x = x[:, :, first : first + self.size, first : first + self.size]
        return self.network(x).logits


def example(card: ModelCard, batch: int = 2, factor: float = 1.0) -> torch.Tensor:
    """Random images (batch, 3, H, W) of about the size that the network sees, times `factor`."""
    height, width = (card.size, card.size) if card.size else card.resize or (128, 192)
    size = [round(side * factor) for side in (height, width)]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def export(network: Network, card: ModelCard) -> tuple[ExportedProgram, float]:
    """Export a network with the preparation of its images.

    Args:
        network: on the CPU, in eval mode.
        card: of the run.

    Returns:
        (the program, the largest difference of its logits from the network's).

    Raises:
        UserError: they differ by more than `TOLERANCE`, or the network needs images of one size
            and gets them as they are.
    """
    if card.resize is None and has_windows(card.model.backbone):
        raise UserError(
            f"--export: {card.model.backbone} is exported for images of one size; train with "
            "data.target.resize, which the exported program then does itself"
        )
    network.memory_format = torch.contiguous_format
    module = Deployed(network.to(memory_format=torch.contiguous_format), card).eval()
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(module, (example(card),), dynamic_shapes=(free,))
    exported, most = program.module(), 0.0
    whole, larger = example(card), example(card, factor=1.5)
    small = larger[:, :, :LEAST, : LEAST + 5]
    for images in (whole, larger, small):
        for batch in BATCHES:
            batch_of = images[:1].expand(batch, -1, -1, -1)
            difference = (exported(batch_of) - module(batch_of)).abs().max()
            most = max(most, float(difference))
    if not most <= TOLERANCE:
        raise UserError(f"the exported program differs from the network by {most:.2g}", 1)
    return program, most


def save_program(program: ExportedProgram, card_text: str, file: Path) -> None:
    """Write a program, and model.yaml within it, to a file for `torch.export.load`."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={CARD: card_text})
    write_atomically(file, lambda f: f.write(buffer.getbuffer()))


def check_onnx() -> None:
    """Raise `UserError` if the packages for ONNX are not installed."""
    if optional("onnx") is None or optional("onnxscript") is None:
        raise UserError("--onnx needs two packages; pip install onnx onnxscript")


def save_onnx(program: ExportedProgram, card_text: str, file: Path) -> None:
    """Write a program as ONNX; model.yaml is the value of its metadata `model.yaml`."""
    converted = torch.onnx.export(
        program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
    )
    converted.model.metadata_props[CARD] = card_text
    write_atomically(file, lambda f: f.write(converted.model_proto.SerializeToString()))
