"""Normalization layers that follow a stream of images."""

import torch
from torch import nn

from common.errors import UserError
from models.backbones import BatchNorm
from models.network import Network

NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm)  # whose scale and shift learn


class StreamNorm(BatchNorm):
    """Batch norm by a mixture of its running statistics, the prior, and those of the batch.

        mean = (N prior mean + n batch mean) / (N + n)
        variance = (N prior variance + n batch variance) / (N + n)

    for a batch of n images (Schneider et al. 2020, arXiv:2006.16971). N is 0 for the
    batch alone; with N above 0 one image suffices. In train mode it normalizes so, and the mixture
    becomes the running statistics; gradients pass through the batch's part. In eval mode it is
    ordinary batch norm, and so it is, with N = 0, for a batch of one value per channel, which has
    no variance. Its tensors have the names of ordinary batch norm.

    Args:
        norm: the layer that it takes the place of, and whose tensors it has.
        prior: N, images.
        pooled: whether N n / (N + n)^2 (prior mean - batch mean)^2 is added to the variance, which
            is then that of the prior's and the batch's values together. A running average needs
            it: without it the variance of single images that are one value each would fall to 0.
    """

    def __init__(self, norm: BatchNorm, prior: float, pooled: bool):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            setattr(self, name, tensor)
        self.prior, self.pooled = prior, pooled

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Accept features (N, C) and maps (N, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or (self.prior == 0 and x.numel() == x.shape[1]):
            tensors = (self.running_mean, self.running_var, self.weight, self.bias)
            return nn.functional.batch_norm(x, *tensors, eps=self.eps)
        values, share = x.float(), len(x) / (self.prior + len(x))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(values, dims, correction=0)
        between = share * (1 - share) * (mean - self.running_mean).square() if self.pooled else 0.0
        mean = torch.lerp(self.running_mean, mean, share)
        variance = torch.lerp(self.running_var, variance, share) + between
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        if self.momentum != 0:  # not within `Network.running_statistics`
            with torch.no_grad():
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return torch.addcmul(shift.view(shape), values, scale.view(shape)).to(x.dtype)


def follow_stream(model: Network, prior: float | None, pooled: bool) -> None:
    """Let scale and shift of the normalization layers alone learn, and batch norm be `StreamNorm`.

    `bn_affine: frozen` keeps those of the backbone's batch norm fixed.

    Args:
        model: is changed.
        prior: of `StreamNorm`; with None batch norm stays as it is.
        pooled: of `StreamNorm`.

    Raises:
        UserError: there is no such layer.
    """
    learning = [
        parameter
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    if not learning:
        raise UserError(
            "this network has no normalization layer that may learn, so nothing would adapt; "
            "start from a run of another model, or without bn_affine: frozen"
        )
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    for name, module in list(model.named_modules()) if prior is not None else ():
        if isinstance(module, BatchNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, StreamNorm(module, prior, pooled))


def copy_statistics(model: nn.Module, source: nn.Module) -> None:
    """Give the batch norm of `model` the running statistics of another model of its layers."""
    for name, buffer in source.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            model.get_buffer(name).copy_(buffer)
