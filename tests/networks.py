"""Network sizes and file-less weights for several test modules."""

from __future__ import annotations

import torch

from vnp_lib.model.esm2 import Architecture
from vnp_lib.model.weights import Weights

SMALLEST = "esm2_t6_8M_UR50D"
TINY = Architecture(num_layers=3, embed_dim=48, attention_heads=6)
RANDOM = Weights.random(SMALLEST)
CPU = torch.device("cpu")
