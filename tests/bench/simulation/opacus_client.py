"""DP-SGD of one client as Opacus' documentation has it: a DataLoader, an optimizer, `PrivacyEngine.make_private`."""

from __future__ import annotations

import warnings

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import CLIP_NORM, NOISE_MULTIPLIER, Workload, loss

warnings.filterwarnings("ignore", message="Full backward hook is firing")
warnings.filterwarnings("ignore", message="Secure RNG turned off")


def train_privately(model: nn.Module, x: Tensor, y: Tensor, workload: Workload) -> None:
    """One epoch of Poisson batches. Opacus' sampling rate is 1/ceil(n/batch)."""
    private, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=workload.lr),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=workload.batch),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
    )
    for some_x, some_y in batches:
        optimizer.zero_grad()
        loss(private(some_x), some_y).backward()
        optimizer.step()
    private.to_standard_module()
