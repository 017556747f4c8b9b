"""Contrastive agreement of two views of an image (SimCLR, Chen et al. 2020, arXiv:2002.05709)."""

import torch
import torch.nn.functional as F

from common.metrics import where_float64
from common.ranks import gather


def nt_xent_loss(z_1: torch.Tensor, z_2: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Cross-entropy of finding the other view of an image among those of all images (eq. 1).

        loss = mean over the 2N views i of -log(exp(s_ij) / sum over k != i of exp(s_ik)),
        s = cosine similarity / temperature, where j is the other view of the same image

    Args:
        z_1, z_2: (N, D) projections of two views; row i of both is one image.
        temperature: above 0; a smaller value gives similar images more weight.

    Returns:
        A float32 scalar from 0, in nats; log(2N - 1) if all views are alike. 0, attached to the
        graph, without any image.
    """
    z = torch.cat([gather(z_1), gather(z_2)]).float()
    if len(z) == 0:
        return z.sum()
    z = F.normalize(where_float64(z).double())  # float64, which autocast leaves alone
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), device=z.device).bool(), -torch.inf)
    partners = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(similarity, partners).float()
