"""Losses of a domain discriminator; source is labeled 1, target 0 (Ganin et al. 2016, eq. 9)."""

import torch
import torch.nn.functional as F

SOURCE, TARGET = 1.0, 0.0


def one_domain_loss(
    logits: torch.Tensor, label: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean binary cross-entropy, in nats, of logits against the label of one domain.

    With the label of the other domain it is the loss of a model that is to fool the discriminator.

    Args:
        logits: discriminator logits of any shape, positive for source.
        label: `SOURCE` or `TARGET`.
        weight: one factor per logit, of the same shape; the mean is taken after weighting.

    Returns:
        A float32 scalar; 0 without any logit.
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
    """Mean over the two domains of the binary cross-entropy of each, in nats.

    Args:
        logits_s, logits_t: discriminator logits of any shape, positive for source; the numbers of
            source and of target logits may differ.
        weight_s, weight_t: one factor per logit, of the same shape; the means are taken after
            weighting.

    Returns:
        A float32 scalar; log 2 if the discriminator is undecided. A domain without any logit
        contributes 0.
    """
    return 0.5 * (
        one_domain_loss(logits_s, SOURCE, weight_s) + one_domain_loss(logits_t, TARGET, weight_t)
    )


@torch.no_grad()
def discriminator_accuracy(logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
    """Accuracy of a discriminator in percent, mean over the two domains, from logits of any shape.

    50: the domains are confused; 100: they are separated.
    """
    return 50 * ((logits_s > 0).float().mean() + (logits_t <= 0).float().mean())
