"""Attracting and dispersing (AaD; Yang et al. 2022, arXiv:2205.04183).

Predictions p (N, K) are probabilities, features (N, D) have length 1.
"""

import torch
from torch import nn


def attraction_loss(p: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """Minus the mean over images of sum_j p_i . p_j over the neighbors j of i (eq. 5, left).

    Args:
        p: float32 (N, K).
        neighbors: predictions of the neighbors of each image, (N, J, K), constants.

    Returns:
        A float32 scalar; 0, attached to the graph, without any image.
    """
    return -torch.einsum("nk,njk->", p, neighbors) / max(len(p), 1)


def dispersion_loss(p: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The mean over images of sum_m p_i . p_m over the other images m of the batch (eq. 5, right).

    Args:
        p: float32 (N, K).
        images: int64 (N,), the numbers of the images. A batch in which one pass over the set ends
            and the next one begins may have an image twice, which is no other image.

    Returns:
        A float32 scalar; 0, attached to the graph, without any image.
    """
    others = images[:, None] != images
    return ((p @ p.T) * others).sum() / max(len(p), 1)


class NeighborBank(nn.Module):
    """The latest feature and prediction of each target image, saved with a run.

    The buffers `features` (M, D) and `p` (M, K) are 0 for images that have not been seen.

    Args:
        num_images: M.
        width: D.
        num_classes: K.
    """

    def __init__(self, num_images: int, width: int, num_classes: int):
        super().__init__()
        self.register_buffer("features", torch.zeros(num_images, width))
        self.register_buffer("p", torch.zeros(num_images, num_classes))

    def remember(self, images: torch.Tensor, features: torch.Tensor, p: torch.Tensor) -> None:
        """Replace what is known of the images numbered by `images`, int64 (N,).

        Of an image that is there twice the first row counts.
        """
        first = (images[:, None] == images).int().argmax(1)  # one value, whichever row is last
        self.features[images] = features.detach()[first]
        self.p[images] = p.detach()[first]

    def nearest(self, images: torch.Tensor, features: torch.Tensor, count: int) -> torch.Tensor:
        """Predictions of the `count` images whose features have the largest cosine.

        Args:
            images: int64 (N,), the numbers of the images themselves, which are excluded.
            features: (N, D).
            count: at most M - 1.

        Returns:
            Float32 (N, count, K), the nearest first.
        """
        cosine = features.detach() @ self.features.T
        cosine.scatter_(1, images[:, None], -2.0)
        return self.p[cosine.topk(count, dim=1).indices]
