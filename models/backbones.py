"""Feature extractors: one table of them, by the names of torchvision where it has them."""

from typing import NamedTuple

import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from common.errors import UserError
from models.caffe import CaffeResNet
from models.layers import BLOCKS, LAYERS, Backbone, Layers
from models.lenet import ClassicLeNet, LeNet
from models.vit import build_vit

STRIDES = (4, 8, 16, 32)  # of layer1 to layer4, but for those of a `Transformer`

BatchNorm = nn.modules.batchnorm._BatchNorm


class Digits(NamedTuple):
    """A network for digits, for classification only."""

    network: type[Backbone]
    strides: tuple[int, ...] = STRIDES
    dilates: bool = False


class Cut(NamedTuple):
    """A network of torchvision, cut at the ends of its stages.

    Attributes:
        ends: names of the children that end layer1 to layer4; in `body`, names in there.
        body: the child that has the stages as its children; None if the network has them itself.
        dense_last: the child that ends layer4 for segmentation, if another: MobileNetV2 ends before
            its last 1x1 convolution, at 320 channels in place of 1280, as in its paper (Sandler et
            al. 2018, arXiv:1801.04381, section 6.3), and the others that have one likewise.
        norm: path of the layer that normalizes the mean of layer4, the classifier's input.
        relu: whether torchvision's forward has a ReLU behind layer4.
        channels_first: whether its children take maps (N, C, H, W), and not (N, H, W, C).
        multiple: see `Backbone`.
        dilates: whether the heads of DeepLab are possible, which need dilation.
    """

    ends: tuple[str, str, str, str]
    body: str | None = None
    dense_last: str | None = None
    norm: str | None = None
    relu: bool = False
    channels_first: bool = True
    multiple: int = 1
    dilates: bool = False


class Caffe(NamedTuple):
    """The kind of ResNet that Caffe had; `network` is torchvision's of the same depth."""

    network: str
    dilates: bool = True


class Transformer(NamedTuple):
    """A vision transformer; see `build_vit`.

    `weights_of` is the name in torchvision whose weights fit; None for DINOv2.
    """

    image_size: int
    patch: int
    depth: int
    heads: int
    width: int
    weights_of: str | None = None
    dilates: bool = False


RESNET = Cut(LAYERS, dilates=True)
CONVNEXT = Cut(("1", "3", "5", "7"), "features", norm="classifier.0", multiple=32)
# The final norm of Swin is outside its body, and ends layer4.
SWIN = Cut(("1", "3", "5", "norm"), "features", channels_first=False, multiple=32)
REGNET = Cut(("block1", "block2", "block3", "block4"), "trunk_output")
DENSENET = Cut(("denseblock1", "denseblock2", "denseblock3", "norm5"), "features", relu=True)
MOBILENET_V2 = Cut(("3", "6", "13", "18"), "features", dense_last="17", dilates=True)
MOBILENET_V3 = Cut(("3", "6", "12", "16"), "features", dense_last="15", dilates=True)
EFFICIENTNET_B0 = Cut(("2", "3", "5", "8"), "features", dense_last="7", dilates=True)
EFFICIENTNET_V2_S = Cut(("2", "3", "5", "7"), "features", dense_last="6", dilates=True)

BACKBONES: dict[str, Digits | Cut | Caffe | Transformer] = {
    "lenet": Digits(LeNet),
    "lenet_classic": Digits(ClassicLeNet, (2, 4, 4, 64)),
    "resnet18": RESNET,
    "resnet34": RESNET,
    "resnet50": RESNET,
    "resnet101": RESNET,
    "resnet152": RESNET,
    "resnext50_32x4d": RESNET,
    "resnet50_caffe": Caffe("resnet50"),
    "resnet101_caffe": Caffe("resnet101"),
    "convnext_tiny": CONVNEXT,
    "convnext_small": CONVNEXT,
    "convnext_base": CONVNEXT,
    "swin_t": SWIN,
    "swin_s": SWIN,
    "swin_b": SWIN,
    "swin_v2_t": SWIN,
    "regnet_y_400mf": REGNET,
    "regnet_y_3_2gf": REGNET,
    "regnet_y_16gf": REGNET,
    "densenet121": DENSENET,
    "mobilenet_v2": MOBILENET_V2,
    "mobilenet_v3_large": MOBILENET_V3,
    "efficientnet_b0": EFFICIENTNET_B0,
    "efficientnet_v2_s": EFFICIENTNET_V2_S,
    "vit_b_16": Transformer(224, 16, 12, 12, 768, "vit_b_16"),
    "vit_b_16_384": Transformer(384, 16, 12, 12, 768, "vit_b_16"),
    "vit_l_16": Transformer(224, 16, 24, 16, 1024, "vit_l_16"),
    "vit_l_16_512": Transformer(512, 16, 24, 16, 1024, "vit_l_16"),
    "dinov2_vits14": Transformer(518, 14, 12, 6, 384),
    "dinov2_vitb14": Transformer(518, 14, 12, 12, 768),
    "dinov2_vitl14": Transformer(518, 14, 24, 16, 1024),
}


def can_be_dilated(name: str) -> bool:
    return BACKBONES[name].dilates


def is_for_digits(name: str) -> bool:
    """Whether it is a network for digits, which knows classification only."""
    return isinstance(BACKBONES[name], Digits)


def is_hierarchical(name: str) -> bool:
    """Whether layer1 to layer4 have the strides 4, 8, 16 and 32."""
    return not isinstance(BACKBONES[name], Transformer)


def has_windows(name: str) -> bool:
    """Whether attention is within windows, so that its code depends on the size of an image."""
    return BACKBONES[name] is SWIN


@torch.no_grad()
def measure(backbone: Backbone) -> tuple[dict[str, int], dict[str, int]]:
    """(channels, strides) of each layer, read off a forward of a small zero image in eval mode."""
    was_training = backbone.training
    backbone.eval()
    features = backbone(torch.zeros(1, 3, backbone.probe, backbone.probe))
    backbone.train(was_training)
    maps = {name: features[name] for name in features if name in LAYERS}
    channels = {name: feature.shape[1] for name, feature in maps.items()}
    strides = {name: backbone.probe // (m.shape[-1] - backbone.border) for name, m in maps.items()}
    return channels, strides


def _cut(name: str, entry: Cut, dense: bool) -> Layers:
    """The layers of a network of torchvision."""
    network = torchvision.models.get_model(name, weights=None)
    modules = {}  # path in the network -> module
    for child, module in network.named_children():
        if child == entry.body:
            modules |= {f"{child}.{inner}": part for inner, part in module.named_children()}
        else:
            modules[child] = module
    last = entry.dense_last if dense and entry.dense_last else entry.ends[3]
    ends = (*entry.ends[:3], last)
    children, paths = {}, {}
    for path, module in modules.items():
        child = path.rpartition(".")[2]
        children[child], paths[path] = module, child
        if child == last:
            break
    if entry.relu:
        children["relu"] = nn.ReLU(inplace=True)
        ends = (*ends[:3], "relu")
    norm = None
    if entry.norm is not None and not dense:
        norm, paths[entry.norm] = network.get_submodule(entry.norm), "pool_norm"
    backbone = Layers(children, ends, not dense, norm, entry.channels_first)
    backbone.multiple, backbone.paths = entry.multiple, paths
    backbone.left_out = tuple(f"{path}." for path in modules if path not in paths)
    return backbone


def build_backbone(
    name: str, batch_norm: bool = True, dense: bool = False
) -> tuple[Backbone, dict[str, int]]:
    """A backbone of the table `BACKBONES`, with random weights.

    Args:
        name: its key.
        batch_norm: whether LeNet has batch norm.
        dense: whether it is for segmentation: without `pooled`, and see `Cut.dense_last`.

    Returns:
        (backbone, channels by layer name).
    """
    entry, strides = BACKBONES[name], STRIDES
    if isinstance(entry, Digits):
        keys = {"batch_norm": batch_norm} if entry.network is LeNet else {}
        backbone: Backbone = entry.network(not dense, **keys)
        strides = entry.strides
    elif isinstance(entry, Caffe):
        backbone = CaffeResNet(entry.network, not dense)
    elif isinstance(entry, Transformer):
        backbone = build_vit(*entry[:5], not dense, dinov2=entry.weights_of is None)
        strides = (entry.patch,) * 4
    else:
        backbone = _cut(name, entry, dense)
    channels, measured = measure(backbone)
    assert tuple(channels) == LAYERS, f"{name}: has the layers {list(channels)}"
    assert tuple(measured.values()) == strides, f"{name}: has the strides {measured}"
    return backbone, channels


def set_drop_path(backbone: Backbone, name: str, rate: float) -> None:
    """Set the rate of drop path, which rises from 0 in the first block to `rate` in the last.

    Huang et al. 2016, arXiv:1603.09382: a training image skips a residual branch by chance.

    Raises:
        UserError: the backbone has none.
    """
    blocks = [module for module in backbone.modules() if isinstance(module, BLOCKS)]
    drops = [[m for m in block.modules() if isinstance(m, StochasticDepth)] for block in blocks]
    if not any(drops):
        raise UserError(f"model.drop_path: backbone {name} has no drop path; leave it out")
    for number, modules in enumerate(drops):
        for module in modules:
            module.p = rate * number / max(len(blocks) - 1, 1)
