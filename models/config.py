"""The `model` section of a config."""

from dataclasses import dataclass, field, fields
from typing import Literal

from common.config import not_negative, positive, range_rules
from common.errors import require
from models.backbones import BACKBONES, can_be_dilated, is_for_digits, is_hierarchical

Backbone = Literal[tuple(BACKBONES)]
Head = Literal["deeplab_v2", "deeplab_v3", "segformer", "daformer", "upsampling"]


@dataclass
class ModelConfig:
    backbone: Backbone = "lenet"  # lenet...: for digits; the others: docs/backbones.md
    weights: str | None = None  # null | published name (docs/backbones.md) | file below data.root
    weights_missing: list[str] = field(default_factory=list)  # prefixes that may be missing
    batch_norm: bool = True  # lenet only: with or without batch norm
    bn: Literal["concat", "separate", "frozen"] = "concat"  # one forward on both | one each | fixed
    bn_running: Literal["both", "target"] = "both"  # bn: separate: whose statistics evaluate
    bn_affine: Literal["train", "frozen"] = "train"  # scale and shift of batch norm
    bn_sync: bool = False  # several GPUs: the network normalizes by the whole batch
    channels_last: bool = False  # memory layout; speed only
    bottleneck: int | None = positive(None, most=100_000)  # Linear + BN + ReLU of this width
    bottleneck_relu: bool = True  # false: without the ReLU, as in SHOT
    head_hidden: int | None = positive(None, most=100_000)  # hidden layer of a classifier's head
    weight_norm: bool = False  # classification: of the classifier (arXiv:1602.07868), as in SHOT
    dropout: float = 0.0  # share of the classifier's inputs; not with a head of DeepLab
    drop_path: float | None = None  # residual branches left out, at the output; null: torchvision's
    label_smoothing: float = not_negative(0.0)  # share of a label spread over all classes alike
    head: Head = "deeplab_v2"  # segmentation; which fits which backbone: docs/backbones.md
    output_stride: Literal[8, 16] = 8  # heads of DeepLab: px of the image per px of layer4
    aux_weight: float = not_negative(0.0)  # segmentation: of an auxiliary head on layer3; 0: none

    def __post_init__(self):
        require(
            *range_rules(self),
            (
                self.batch_norm or self.backbone == "lenet",
                "batch_norm: false is for backbone: lenet",
            ),
            (
                self.bn_running == "both" or self.bn == "separate",
                "bn_running: target needs bn: separate",
            ),
            (
                self.bottleneck_relu or self.bottleneck is not None,
                "bottleneck_relu: false needs a bottleneck",
            ),
            (0 <= self.dropout < 1, "dropout must lie in [0, 1)"),
            (
                self.drop_path is None or 0 <= self.drop_path < 1,
                "drop_path must lie in [0, 1)",
            ),
            (self.label_smoothing < 1, "label_smoothing must be below 1"),
        )

    def rules(self, task: str) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) that the task asks of the model."""
        if task == "classification":
            defaults = {spec.name: spec.default for spec in fields(self)}
            keys = ("head", "output_stride", "aux_weight")
            changed = [key for key in keys if getattr(self, key) != defaults[key]]
            return [(not changed, f"model: {', '.join(changed)} for task: segmentation only")]
        deeplab, backbone = self.head.startswith("deeplab"), self.backbone
        fitting = fitting_heads(backbone)
        return [
            (
                not is_for_digits(backbone),
                f"model.backbone: {backbone} is for task: classification; choose another",
            ),
            (
                is_for_digits(backbone) or self.head in fitting,
                f"model.head: {self.head} does not fit {backbone}, which takes "
                f"{' or '.join(fitting)}",
            ),
            (
                deeplab or self.output_stride == 8,
                "model.output_stride is for the heads deeplab_v2 and deeplab_v3; leave it at 8",
            ),
            (
                not deeplab or self.dropout == 0,
                "model.dropout is for task: classification, and for heads other than DeepLab's",
            ),
            (self.bottleneck is None, "model.bottleneck is for task: classification"),
            (self.head_hidden is None, "model.head_hidden is for task: classification"),
            (not self.weight_norm, "model.weight_norm is for task: classification"),
        ]


def fitting_heads(backbone: str) -> list[str]:
    """The heads for segmentation that fit a backbone.

    DeepLab's need a backbone that can be dilated, those of several levels maps of several strides,
    and `upsampling` is for maps of one stride. None fits a network for digits.
    """
    if is_for_digits(backbone):
        return []
    if not is_hierarchical(backbone):
        return ["upsampling"]
    dilated = ["deeplab_v2", "deeplab_v3"] if can_be_dilated(backbone) else []
    several = [] if backbone.endswith("_caffe") else ["segformer", "daformer"]  # corners aligned
    return [*dilated, *several]
