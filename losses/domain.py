"""Loss of a domain discriminator, with source labelled 1 and target 0 (Ganin et al. 2016, eq. 9)."""

import torch
import torch.nn.functional as F


def domain_loss(
    logits_s: torch.Tensor,
    logits_t: torch.Tensor,
    weight_s: torch.Tensor | None = None,
    weight_t: torch.Tensor | None = None,
) -> torch.Tensor:
    """0.5 * (mean source + mean target) binary cross-entropy, in nats.

    Args:
        logits_s, logits_t: discriminator logits of any shape, positive for source; the domains may differ in number.
        weight_s, weight_t: factor per logit, of the logits' shape; the means are taken after weighting.

    Returns a float32 scalar; log 2 when the discriminator is undecided. An empty domain counts 0.
    """
    loss_s = F.binary_cross_entropy_with_logits(
        logits_s.float(), torch.ones_like(logits_s, dtype=torch.float32), weight_s, reduction="sum"
    )
    loss_t = F.binary_cross_entropy_with_logits(
        logits_t.float(), torch.zeros_like(logits_t, dtype=torch.float32), weight_t, reduction="sum"
    )
    return 0.5 * (loss_s / max(logits_s.numel(), 1) + loss_t / max(logits_t.numel(), 1))


@torch.no_grad()
def discriminator_accuracy(logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
    """Share in percent of logits on the right side of zero, mean over domains: 50 confused, 100 separated."""
    return 50 * ((logits_s > 0).float().mean() + (logits_t <= 0).float().mean())
