"""What the adapted networks share: output, normalization of images, batch norm, freezing."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from common.errors import UserError
from models.backbones import BatchNorm
from models.config import ModelConfig
from models.layers import Backbone
from models.published import normalization


class ModelOutput(NamedTuple):
    """What every model returns, in train and eval alike.

    Attributes:
        logits: (N, K), or (N, K, H, W) at the size of the images; class axis 1.
        features: layer name -> (N, C, H', W'), of a classifier `pooled` -> (N, D), its input, and
            `logits`, the same tensor as above.
        aux_logits: those of the auxiliary head, None without one.
        joint: with one forward of both domains, the features of all its images, which the head
            reads and of which `features` are parts; else None.
    """

    logits: torch.Tensor
    features: dict[str, torch.Tensor]
    aux_logits: torch.Tensor | None = None
    joint: dict[str, torch.Tensor] | None = None


@dataclass
class BackboneFeatures:
    """The features of a batch of images that the heads read, computed earlier (`cache_features`).

    Attributes:
        features: layer name -> (N, C, H', W').
        size: height and width of the images.
    """

    features: dict[str, torch.Tensor]
    size: tuple[int, ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "BackboneFeatures":
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in self.features.items()}
        return BackboneFeatures(moved, self.size)


class Network(nn.Module):
    """A backbone and what a subclass builds on it: uint8 images (N, 3, H, W) -> `ModelOutput`.

    Scaling and normalization of the images happen here, on the device. A subclass builds its
    modules, `head` among them, then calls `prepare`. It has `predict`, from the backbone's features
    and the height and width of the images to a `ModelOutput`; `head_inputs`, the features that
    `predict` reads; `build_head`, which makes a head with random weights; and `head_logits`, the
    logits of such a head on `ModelOutput.features` of images of a height and width.

    Attributes:
        channels: width of each feature by name.
        layers_read: names of the features in a `ModelOutput` that the head reads.
    """

    layers_read: tuple[str, ...]
    compiled: dict | None = None  # the options of `compile`, if it was called

    def __init__(self, backbone: Backbone, channels: dict[str, int], config: ModelConfig):
        super().__init__()
        self.backbone, self.channels, self.config = backbone, channels, config
        self.freeze_statistics = config.bn == "frozen"
        self.fixed_affine = config.bn_affine == "frozen"
        self.frozen: tuple[str, ...] = ()
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.set_normalization(*normalization(config.backbone, config.weights))

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation of the three channels, of images from 0 to 1."""
        for name, values in (("mean", mean), ("std", std)):
            scaled = 255 * torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, scaled, persistent=False)

    def prepare(self, config: ModelConfig) -> None:
        """Apply memory format and batch-norm keys.

        Raises:
            UserError: a batch-norm key is set, and the network has no batch norm.
        """
        changed = {
            "bn: frozen": self.freeze_statistics,
            "bn_affine: frozen": self.fixed_affine,
            "bn_running: target": config.bn_running == "target",
        }
        for key, is_set in changed.items():
            if is_set and next(self._batch_norms(), None) is None:
                raise UserError(
                    f"model.{key}: backbone {config.backbone} has no batch norm here; "
                    "leave the key out"
                )
        if config.bn_sync and not any(isinstance(m, BatchNorm) for m in self.modules()):
            raise UserError("model.bn_sync: this network has no batch norm; leave the key out")
        self.to(memory_format=self.memory_format)
        for module in self._batch_norms():
            module.requires_grad_(not self.fixed_affine)
        self.train()  # frozen statistics are frozen from the start

    def _batch_norms(self) -> Iterator[nn.Module]:
        """Batch-norm layers of the backbone; new layers have no pretrained statistics to keep."""
        return (module for module in self.backbone.modules() if isinstance(module, BatchNorm))

    @property
    def learns_statistics(self) -> bool:
        """Whether training changes the statistics of a batch-norm layer."""
        fixed = set(self._batch_norms()) if self.freeze_statistics else set()
        for name in self.frozen:
            fixed.update(self.get_submodule(name).modules())
        layers = (module for module in self.modules() if isinstance(module, BatchNorm))
        return any(layer not in fixed for layer in layers)

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        if self.freeze_statistics:
            for module in self._batch_norms():
                module.eval()
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def compile(self, **options) -> None:
        """Compile `forward` as a whole, by torch.compile; copies of the network are compiled too.

        Names in the state do not change.
        """
        # Modes, batch sizes and image sizes have a graph each; torch's own limit is 8.
        torch._dynamo.config.recompile_limit = 64
        super().compile(fullgraph=True, **options)
        self.compiled = options

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.compiled is not None:
            self.compile(**self.compiled)

    def forward(self, images: torch.Tensor | BackboneFeatures) -> ModelOutput:
        """Images uint8 (N, 3, H, W), or their features."""
        if isinstance(images, BackboneFeatures):
            return self.predict(images.features, images.size)
        return self.predict(self.backbone(self.normalize(images)), images.shape[2:])

    @property
    def head_layer(self) -> str:
        """Name of the last feature that the head reads."""
        return self.layers_read[-1]

    def new_head(self) -> nn.Module:
        """Another head of the network's own architecture, with random weights of its own."""
        head = copy.deepcopy(self.head)  # on its device, with synchronized batch norm if it has it
        head.load_state_dict(self.build_head().state_dict())
        return head

    def freeze(self, *names: str) -> None:
        """Fix submodules: no gradients, and eval mode even after `train`."""
        self.frozen = tuple(name for name in names if getattr(self, name, None) is not None)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def unfreeze(self, part: list[str] | float) -> None:
        """Let part of a frozen backbone learn again; its statistics and dropout stay in eval mode.

        Args:
            part: names of stages, or the last share of convolutions, linear layers and layers of
                attention. A stage is all that follows the one before, so that layer1 includes the
                stem.

        Raises:
            UserError: no such stage.
        """
        if isinstance(part, float):
            layers = [m for m in self.backbone.modules() if m._parameters]
            weighted = [i for i, m in enumerate(layers) if _has_matrix(m)]
            count = math.ceil(part * len(weighted))
            modules = layers[weighted[-count] :] if count < len(weighted) else [self.backbone]
        else:
            stages = self.backbone.stages()
            if unknown := [name for name in part if name not in stages]:
                raise UserError(f"unfreeze: no stage {unknown[0]!r}; there are {', '.join(stages)}")
            modules = [module for name in part for module in stages[name]]
        for module in modules:
            module.requires_grad_(True)
        for module in self._batch_norms():
            if self.fixed_affine:
                module.requires_grad_(False)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> float32, less the mean, by the standard deviation."""
        x = images.to(torch.float32, memory_format=self.memory_format, copy=True)
        return x.sub_(self.mean).div_(self.std)

    @contextmanager
    def running_statistics(self, fixed: bool):
        """A context in which, if `fixed`, batch norm does not update its running statistics.

        It still normalizes by the statistics of the batch.
        """
        norms = [m for m in self.modules() if isinstance(m, BatchNorm)] if fixed else []
        momenta = [(module, module.momentum) for module in norms]
        for module in norms:
            module.momentum = 0.0
        try:
            yield
        finally:
            for module, momentum in momenta:
                module.momentum = momentum

    def param_groups(self, lr_scale: float, layer_decay: float | None = None) -> list[dict]:
        """The backbone's trainable parameters at `lr_scale`, those of new layers at 1.

        With `layer_decay` the rate falls from the output to the input of the backbone, by this
        factor per block (Clark et al. 2020, arXiv:2003.10555; as in the code of MAE). What follows
        the last block has the full rate, and the stem the lowest.

        Raises:
            UserError: `layer_decay` with a backbone that has no residual blocks.
        """
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        known = set(backbone)
        new = [p for p in self.parameters() if p.requires_grad and p not in known]
        groups = [{"params": backbone, "lr_scale": lr_scale}]
        if layer_decay is not None:
            by_depth = self.backbone.parameters_by_depth()
            if len(by_depth) == 2:
                raise UserError("optim.layer_decay: this backbone has no blocks; leave it out")
            groups = [
                {
                    "params": [p for p in parameters if p.requires_grad],
                    "lr_scale": lr_scale * layer_decay ** (len(by_depth) - 1 - depth),
                }
                for depth, parameters in enumerate(by_depth)
            ]
        return [*groups, {"params": new, "lr_scale": 1.0}]

    def check_layers(self, names: list[str], key: str = "feature_layers") -> None:
        """Raise `UserError`, naming the config's `key`, for a layer that is not in the model."""
        for name in names:
            if name not in self.channels:
                raise UserError(f"{key}: no layer {name!r}; there are {', '.join(self.channels)}")


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module is a convolution, a linear layer or one of attention."""
    weight = getattr(module, "weight", getattr(module, "in_proj_weight", None))
    return weight is not None and weight.dim() > 1


@dataclass
class FeatureCache:
    """The features of all images of a set that the heads read, and the labels, on one device."""

    features: BackboneFeatures
    labels: torch.Tensor

    def batches(
        self, positions: Sequence[torch.Tensor]
    ) -> Iterator[tuple[BackboneFeatures, torch.Tensor]]:
        """(features, labels) of the images numbered by each of `positions`, all (batch,)."""
        if not positions:
            return
        for rows in torch.stack(list(positions)).to(self.labels.device):  # moved at once
            batch = {name: feature[rows] for name, feature in self.features.features.items()}
            yield BackboneFeatures(batch, self.features.size), self.labels[rows]


@torch.no_grad()
def cache_features(
    model: Network, batches: DataLoader, limit_gb: float, device: torch.device
) -> FeatureCache | None:
    """The features of every labeled image that the heads read, and the labels.

    With a frozen backbone and unchanging images, training on the features is training on the
    images.

    Args:
        model: its backbone computes the features.
        batches: (images, labels), all images of one size.
        limit_gb: bound of the memory, in GiB.
        device: of model and features.

    Returns:
        The features; None, and prints why, if they need more than `limit_gb` GiB.
    """

    def parts_of(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = model.head_inputs(model.backbone(model.normalize(x.to(device, non_blocking=True))))
        return {**inputs, "labels": y.to(device, non_blocking=True)}

    count, done = len(batches.dataset.set), 0
    x, y = batches.dataset[0]
    size, one = x.shape[2:], parts_of(x[:1], y[:1])
    needed = count * sum(part.element_size() * part.numel() for part in one.values()) / 2**30
    if needed > limit_gb:
        print(
            f"features of {count} images need {needed:.1f} GiB, more than feature_gb: "
            "computed anew in each step"
        )
        return None
    store = {name: part.new_empty(count, *part.shape[1:]) for name, part in one.items()}
    for x, y in batches:
        for name, part in parts_of(x, y).items():
            store[name][done : done + len(part)] = part
        done += len(x)
    labels = store.pop("labels")
    return FeatureCache(BackboneFeatures(store, size), labels)


def eval_mode(model: nn.Module, batch_statistics: bool) -> None:
    """Put a model in eval mode, but with `batch_statistics` not its batch norm.

    Batch norm then normalizes by the statistics of the batch and updates its running ones; frozen
    statistics stay fixed. Dropout is off either way.
    """
    model.train(batch_statistics)
    for module in model.modules():
        module.training = module.training and isinstance(module, BatchNorm)


def forward_domains(
    model: Network, x_s: torch.Tensor, x_t: torch.Tensor, config: ModelConfig
) -> tuple[ModelOutput, ModelOutput]:
    """Outputs on source and target images.

    `bn: separate` runs one forward per domain, so that each is normalized by its own statistics;
    with `bn_running: target` only those of the target enter the running statistics for evaluation.
    `concat` and `frozen` run one forward on both, which is faster. With `frozen` the result does
    not depend on this, so that images of two sizes are possible, in one forward per domain.

    Args:
        model: the network.
        x_s, x_t: source and target images, uint8 (N, 3, H, W).
        config: the section `model`.

    Returns:
        (output on source, output on target).

    Raises:
        UserError: `bn: concat` with images of two sizes.
    """
    if config.bn == "separate":
        with model.running_statistics(fixed=config.bn_running == "target"):
            out_s = model(x_s)
        return out_s, model(x_t)
    if x_s.shape[1:] != x_t.shape[1:]:
        if config.bn == "frozen":
            return model(x_s), model(x_t)
        height_s, width_s = x_s.shape[2:]
        height_t, width_t = x_t.shape[2:]
        raise UserError(
            "model.bn: concat forwards both domains at once, but source images are "
            f"{height_s}x{width_s} px and target images {height_t}x{width_t}; give data.source and "
            "data.target the same crop, or use bn: separate"
        )
    sizes = [len(x_s), len(x_t)]
    out = model(torch.cat([x_s, x_t]))
    pairs = {name: feature.split(sizes) for name, feature in out.features.items()}
    features_s, features_t = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    logits_s, logits_t = out.logits.split(sizes)
    aux_s, aux_t = (None, None) if out.aux_logits is None else out.aux_logits.split(sizes)
    return (
        ModelOutput(logits_s, features_s, aux_s, out.features),
        ModelOutput(logits_t, features_t, aux_t, out.features),
    )


def forward_head(
    model: Network,
    head: nn.Module,
    out_s: ModelOutput,
    out_t: ModelOutput,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of another head on what the model's own head has read of both domains.

    There is one forward on both domains where `forward_domains` had one, and else one per domain,
    so that batch norm within the head takes its statistics over the same images.

    Args:
        model: the network.
        head: of `model.new_head()`.
        out_s, out_t: outputs of `forward_domains` on source and target images.
        change: what happens to each feature before the head reads it, such as gradient reversal.

    Returns:
        (logits on source, logits on target), of the shapes of `out_s.logits` and `out_t.logits`.
    """

    def logits(features: dict[str, torch.Tensor], out: ModelOutput) -> torch.Tensor:
        changed = {name: change(features[name]) for name in model.layers_read}
        return model.head_logits(head, changed, out.logits.shape[2:])

    if out_s.joint is None:
        return logits(out_s.features, out_s), logits(out_t.features, out_t)
    logits_s, logits_t = logits(out_s.joint, out_s).split([len(out_s.logits), len(out_t.logits)])
    return logits_s, logits_t
