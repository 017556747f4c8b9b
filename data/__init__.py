"""Data sets, and the loaders that make order and augmentation pure functions of seed, domain and position."""

from data.domains import Domains, open_domains
from data.loaders import eval_loader, train_loader

__all__ = ["Domains", "eval_loader", "open_domains", "train_loader"]
