"""Loss of a domain discriminator, with source labelled 1 and target 0 (Ganin et al. 2016, eq. 9)."""

import torch
import torch.nn.functional as F

SOURCE, TARGET = 1.0, 0.0


def one_domain_loss(logits: torch.Tensor, label: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean binary cross-entropy, in nats, of logits of any shape against the label of one domain; 0 without any.

    With the other domain's label it is what fools a discriminator.
    """
    labels = torch.full_like(logits, label, dtype=torch.float32)
    loss = F.binary_cross_entropy_with_logits(logits.float(), labels, weight, reduction="sum")
    return loss / max(logits.numel(), 1)


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
    return 0.5 * (one_domain_loss(logits_s, SOURCE, weight_s) + one_domain_loss(logits_t, TARGET, weight_t))


@torch.no_grad()
def discriminator_accuracy(logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
    """Share in percent of logits on the right side of zero, mean over domains: 50 confused, 100 separated."""
    return 50 * ((logits_s > 0).float().mean() + (logits_t <= 0).float().mean())
