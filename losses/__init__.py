"""Losses: one idea per file, as functions on tensors. The class axis is 1."""
