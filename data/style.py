"""Fourier style transfer between the domains (Yang and Soatto 2020, arXiv:2004.05498)."""

import torch
from torchvision.transforms.v2 import functional as F


def fourier_style(images: torch.Tensor, styles: torch.Tensor, share: float) -> torch.Tensor:
    """Give images the low frequencies of others: FDA, equations 1 to 3.

    The amplitudes of the frequencies up to b in both directions, b = floor(share * the shorter
    side), are replaced by those of the style image; all phases, and so the edges, remain.

    Args:
        images: uint8 (N, C, H, W).
        styles: uint8 (N, C', H', W'); resized to H x W. C and C' are 1 or 3.
        share: the paper's beta, from 0 to 0.5; 0 replaces the mean color alone.

    Returns:
        uint8 (N, C'', H, W), clipped to the range of values; C'' is the larger of C and C'.
    """
    size, channels = images.shape[-2:], max(images.shape[1], styles.shape[1])
    if styles.shape[-2:] != size:
        styles = F.resize(styles, list(size), antialias=True)
    images, styles = (x.expand(-1, channels, -1, -1) for x in (images, styles))
    if len(images) == 0:  # an error of the FFT
        return images
    spectrum, style = torch.fft.rfft2(images.float()), torch.fft.rfft2(styles.float())
    most = int(share * min(size))
    # A spectrum of real images has the frequencies 0 .. H/2 and -H/2 .. -1 in its rows, and those
    # from 0 on alone in its columns; the others are their conjugates.
    low = torch.fft.fftfreq(size[0], 1 / size[0]).abs()[:, None] <= most
    low = low & (torch.arange(spectrum.shape[-1]) <= most)
    amplitude = torch.where(low.to(images.device), style.abs(), spectrum.abs())
    styled = torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=size)
    return styled.round_().clamp_(0, 255).to(torch.uint8)
