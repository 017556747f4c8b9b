"""Feature extractors: every backbone yields `layer1..layer4`, at strides 4, 8, 16 and 32."""

from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from common.checkpoint import load_tensors
from common.runtime import UserError

LAYERS = ("layer1", "layer2", "layer3", "layer4")


class LeNet(nn.Module):
    """LeNet-like digit network: two 5x5 convolutions (layer1), then three 3x3 ones, one a stage.

    Every convolution is followed by max pooling, batch norm (by key) and ReLU. 28 px end at 1x1.
    """

    def __init__(self, batch_norm: bool = True):
        super().__init__()

        def conv(in_channels, out_channels, kernel_size):
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size, padding="same", bias=not batch_norm),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity(),
                nn.ReLU(inplace=True),
            )

        self.layer1 = nn.Sequential(conv(3, 32, 5), conv(32, 64, 5))
        self.layer2 = conv(64, 128, 3)
        self.layer3 = conv(128, 128, 3)
        self.layer4 = conv(128, 128, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name in LAYERS:
            x = features[name] = self.get_submodule(name)(x)
        return features


def build_backbone(name: str, batch_norm: bool = True, for_maps: bool = False) -> tuple[nn.Module, dict[str, int]]:
    """(module, channels by layer name); the module maps images (N, 3, H, W) to a dict of (N, C, H', W').

    `for_maps` ends MobileNetV2 before its last 1x1 convolution, at 320 channels in place of 1280, as its paper does for
    segmentation (Sandler et al. 2018, arXiv:1801.04381, section 6.3), and EfficientNet likewise.
    """
    if name == "lenet":
        return LeNet(batch_norm), dict(zip(LAYERS, (64, 128, 128, 128), strict=True))
    network = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":  # the last index of each stride
        stages = {"3": "layer1", "6": "layer2", "13": "layer3", "17" if for_maps else "18": "layer4"}
        channels = dict(zip(LAYERS, (24, 32, 96, 320 if for_maps else 1280), strict=True))
        return IntermediateLayerGetter(network.features, stages), channels
    if name == "efficientnet_b0":
        stages = {"2": "layer1", "3": "layer2", "5": "layer3", "7" if for_maps else "8": "layer4"}
        channels = dict(zip(LAYERS, (24, 40, 112, 320 if for_maps else 1280), strict=True))
        return IntermediateLayerGetter(network.features, stages), channels
    width = network.fc.in_features
    return IntermediateLayerGetter(network, {k: k for k in LAYERS}), dict(
        zip(LAYERS, (width // 8, width // 4, width // 2, width), strict=True)
    )


def backbone_stages(backbone: nn.Module) -> dict[str, list[nn.Module]]:
    """The backbone's modules by the stage they belong to: all after the stage before, up to its own output."""
    outputs, stages, modules = getattr(backbone, "return_layers", {}), {}, []
    for name, module in backbone.named_children():
        modules.append(module)
        if stage := outputs.get(name, name if name in LAYERS else None):
            stages[stage], modules = modules, []
    return stages


def dilate(backbone: nn.Module, output_stride: int) -> None:
    """Let layer4, and at `output_stride` 8 layer3 too, keep the resolution: dilation takes the place of their strides.

    A strided convolution becomes dense and reads the dilated map before it; those behind it are dilated once more
    (Chen et al. 2017, arXiv:1706.05587, section 3.2), as torchvision's `replace_stride_with_dilation` does.
    """
    stride = dilation = 1
    for module in backbone.modules():
        if isinstance(module, nn.MaxPool2d):
            stride *= module.stride
        if not isinstance(module, nn.Conv2d):
            continue
        before, strided = dilation, module.stride == (2, 2)
        if strided and module.kernel_size == (1, 1):  # a ResNet's shortcut, beside the 3x3 that strides or did
            module.stride = (2, 2) if dilation == 1 else (1, 1)
        elif strided and stride < output_stride:
            stride *= 2
        elif strided:
            dilation *= 2
            module.stride = (1, 1)
        if module.kernel_size > (1, 1):
            module.dilation, half = (before, before), before * (module.kernel_size[0] // 2)
            module.padding = (half, half)


def load_weights(backbone: nn.Module, name: str, weights: str, root: str, may_miss: list[str]) -> None:
    """Load ImageNet weights in torchvision's names: a name of its enum (downloaded), or a file below `root`.

    The classifier of the file is left aside. Prints "loaded N of M tensors".

    Raises:
        UserError: no such name or file, or a tensor of the backbone is missing or of another shape and is not
            covered by a prefix in `may_miss`.
    """
    path = Path(root, weights)
    if path.is_file():
        state = load_tensors(path)
    elif name == "lenet" or path.suffix:
        raise UserError(f"model.weights: there is no file {path}")
    else:
        enum = torchvision.models.get_model_weights(name)
        if weights not in enum.__members__:
            names = ", ".join(enum.__members__)
            raise UserError(f"model.weights: no file {path}, and {name} has no weights {weights!r}; there are {names}")
        try:
            state = enum[weights].get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise UserError(
                f"model.weights: {weights} of {name} cannot be downloaded ({error}); name a file instead"
            ) from None
    state = {key.removeprefix("features."): value for key, value in state.items()}
    # torchvision's older files have no batch counters, which only momentum: null reads
    own = {k: v for k, v in backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    print(f"weights {weights}: loaded {len(fits)} of {len(own)} tensors")
    missing = [k for k in own if k not in fits and not k.startswith(tuple(may_miss))]
    if missing:
        raise UserError(
            f"model.weights: {weights} lacks {len(missing)} of {name}'s {len(own)} tensors, the first {missing[0]}; "
            "are they weights of another backbone? What may be missing is named in model.weights_missing"
        )
    foreign = set(state) - set(backbone.state_dict())
    # of MobileNetV2 and EfficientNet the last convolution too, which a segmenter leaves out
    aside = ("fc.", "classifier.", *{"mobilenet_v2": ["18."], "efficientnet_b0": ["8."]}.get(name, []))
    if extra := [k for k in state if k in foreign and not k.startswith(aside)]:
        raise UserError(
            f"model.weights: {weights} holds {len(extra)} tensors that {name} has not, the first {extra[0]}; "
            "are they weights of another backbone?"
        )
    backbone.load_state_dict(fits, strict=False)
