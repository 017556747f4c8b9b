"""Published files of weights, whose tensors have other names than those of torchvision."""

import re

import torch
import torchvision

from common.errors import UserError
from models.backbones import BACKBONES, Caffe, Digits, Transformer
from models.caffe import CAFFE_MEAN, CAFFE_STD, caffe_names

State = dict[str, torch.Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DINOV2 = "LVD142M"  # the data set of DINOv2 names its weights
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
DINOV2_NAMES = (  # (pattern, torchvision's name)
    (r"cls_token", "class_token"),
    (r"pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.", "conv_proj."),
    (r"norm\.", "encoder.ln."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"blocks\.(\d+)\.ls1\.", r"encoder.layers.encoder_layer_\1.dropout."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    (r"blocks\.(\d+)\.ls2\.", r"encoder.layers.encoder_layer_\1.mlp.4."),
)
CONVNEXT_PARTS = {
    "dwconv": "block.0",
    "norm": "block.2",
    "pwconv1": "block.3",
    "pwconv2": "block.5",
}


def torchvision_names(name: str, state: State) -> State:
    """The tensors of a file by torchvision's names, those of its head left out if it had others.

    Known are the files of DINOv2, of ConvNeXt's authors and of the ConvNeXt of DINOv3 (which have
    the same names), of DeepLab-v2's authors, and the older ones of torchvision.

    Args:
        name: of the backbone.
        state: as read.

    Raises:
        UserError: a file of DINOv2 with registers.
    """
    entry = BACKBONES[name]
    if isinstance(entry, Caffe):
        return caffe_names(name, state)
    if isinstance(entry, Transformer) and "cls_token" in state:
        return _dinov2_names(name, state)
    if "downsample_layers.0.0.weight" in state:
        return _convnext_names(state)
    if isinstance(entry, Transformer):
        pairs = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}
        for old, new in pairs.items():
            state = {key.replace(old, new): value for key, value in state.items()}
    if name.startswith("densenet"):
        old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
        state = {old.sub(r"\1\2", key): value for key, value in state.items()}
    return state


def _dinov2_names(name: str, state: State) -> State:
    if "register_tokens" in state:
        raise UserError(
            f"model.weights: these weights have registers, and {name} has none; "
            f"take those without (in the file's name, without _reg4)"
        )
    named = {}
    for key, value in state.items():
        for pattern, new in DINOV2_NAMES:
            key = re.sub(f"^{pattern}", new, key)
        if key != "mask_token":  # of the training on images without labels
            named[key] = value
    return named


def _convnext_names(state: State) -> State:
    named = {}
    for key, value in state.items():
        if match := re.fullmatch(r"downsample_layers\.(\d)\.(.+)", key):
            named[f"features.{2 * int(match[1])}.{match[2]}"] = value
        elif match := re.fullmatch(r"stages\.(\d)\.(\d+)\.gamma", key):
            named[f"features.{2 * int(match[1]) + 1}.{match[2]}.layer_scale"] = value[:, None, None]
        elif match := re.fullmatch(r"stages\.(\d)\.(\d+)\.(\w+)\.(\w+)", key):
            part = CONVNEXT_PARTS.get(match[3], match[3])
            named[f"features.{2 * int(match[1]) + 1}.{match[2]}.{part}.{match[4]}"] = value
        elif match := re.fullmatch(r"norm\.(.+)", key):
            named[f"classifier.0.{match[1]}"] = value
        elif not key.startswith(("head.", "norms.3.")):  # norms.3 is the same as norm
            named[key] = value
    return named


def enum_of(name: str):
    """torchvision's enum of weights of a backbone; None if it has none."""
    entry = BACKBONES[name]
    if isinstance(entry, (Digits, Caffe)):
        return None
    known = entry.weights_of if isinstance(entry, Transformer) else name
    return torchvision.models.get_model_weights(known) if known else None


def published_weights(name: str) -> list[str]:
    """The names that `model.weights` may have for a backbone, which are downloaded."""
    entry, enum = BACKBONES[name], enum_of(name)
    if isinstance(entry, Transformer) and entry.weights_of is None:
        return [DINOV2]
    if isinstance(entry, Transformer):  # their positions are for images of one size
        return [w.name for w in enum if w.meta["min_size"] == (entry.image_size,) * 2]
    return [w.name for w in enum] if enum is not None else []


def normalization(name: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of the channels red, green and blue, from 0 to 1.

    Those that `weights` were trained with, if they are a name of torchvision's; else the usual ones
    of the backbone: ImageNet's, or Caffe's.
    """
    if isinstance(BACKBONES[name], Caffe):
        return CAFFE_MEAN, CAFFE_STD
    enum = enum_of(name)
    if enum is not None and weights in enum.__members__:
        preparation = enum[weights].transforms()
        return tuple(preparation.mean), tuple(preparation.std)
    return IMAGENET_MEAN, IMAGENET_STD
