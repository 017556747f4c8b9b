"""Maximum mean discrepancy with several Gaussian kernels.

DAN, Long et al. 2015, arXiv:1502.02791, section 3.
"""

import torch

from common.errors import UserError
from common.ranks import gather

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # widths of the kernels, in mean squared distances


def mmd_loss(
    x_s: torch.Tensor, x_t: torch.Tensor, widths: tuple[float, ...] = WIDTHS
) -> torch.Tensor:
    """Unbiased estimate of the squared MMD from N pairs of rows.

    Gretton et al. 2012, JMLR 13, lemma 6:

        1 / (N (N - 1)) * sum over i != j of k(s_i, s_j) + k(t_i, t_j) - k(s_i, t_j) - k(s_j, t_i)

    i != j holds in the cross terms too, so that equal samples give 0 up to rounding. The estimate
    may be negative. The kernel is

        k(a, b) = sum over w in widths of exp(-|a - b|^2 / (2 w m))

    with m the mean squared distance between all pairs of the 2N rows, without gradient.

    Args:
        x_s, x_t: (N, D) features of source and of target images.
        widths: widths of the kernels, in units of m.

    Returns:
        A float32 scalar; 0, attached to the graph, for N below 2.

    Raises:
        UserError: x_s and x_t have different numbers of rows.
    """
    if len(x_s) != len(x_t):
        raise UserError(
            "mmd_loss pairs source and target feature vectors, but there are "
            f"{len(x_s)} and {len(x_t)}; give data.source and data.target the same crop"
        )
    x_s, x_t = gather(x_s), gather(x_t)
    n = len(x_s)
    x = torch.cat([x_s, x_t]).float()
    if n < 2:
        return 0 * x.sum()
    x = x - x.detach().mean(0)  # cdist is inaccurate far from the origin
    squared = torch.cdist(x, x).square()  # float32 under autocast too
    scale = 2 * squared.detach().mean().clamp_min(torch.finfo(torch.float32).tiny)
    kernel = sum(torch.exp(-squared / (w * scale)) for w in widths)
    within = kernel[:n, :n] + kernel[n:, n:]
    across = kernel[:n, n:]
    pairs = within - across - across.T
    return (pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))
