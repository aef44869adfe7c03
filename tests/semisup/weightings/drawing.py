"""Logits and images that tests of weightings draw."""

import torch


def draw_logits(n=12, classes=3, seed=0):
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def draw_images(n=12):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
