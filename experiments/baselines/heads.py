"""Projectors, predictors and prototypes: the papers' widths for wide encoders, smaller ones for narrow encoders.

Letters: B batch, E encoder width, D output width, K prototypes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.batch_norm import GlobalBatchNorm1d
from common.blocks.decoder import MAEDecoder
from common.blocks.vit import init_transformer_weights

#: Encoders narrower than this, such as those of small.yaml, get the small heads.
WIDE = 384


def mlp(widths: Sequence[int], last_norm: bool = False, last_affine: bool = True) -> nn.Sequential:
    """Stack linear layers, each but the last with batch normalisation over all ranks and a ReLU.

    Args:
        widths: Of the input, of every layer.
        last_norm: Whether the output is normalised too.
        last_affine: Whether that normalisation has weights.
    """
    layers: list[nn.Module] = []
    for width, out in pairwise(widths[:-1]):
        layers += [nn.Linear(width, out, bias=False), GlobalBatchNorm1d(out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
    if last_norm:
        layers.append(GlobalBatchNorm1d(widths[-1], affine=last_affine))
    return nn.Sequential(*layers)


def simclr_projector(width: int) -> nn.Module:
    """E-2048-2048-128 with normalisation after each (SimCLR v2, Chen et al. 2020); 512 where narrow."""
    hidden = 2048 if width >= WIDE else 512
    return mlp([width, hidden, hidden, 128], last_norm=True)


def expander(width: int) -> nn.Module:
    """E-2048-2048-2048, of VICReg and Barlow Twins (whose 8192 were for a ResNet-50); 512 where narrow."""
    hidden = 2048 if width >= WIDE else 512
    return mlp([width, hidden, hidden, hidden])


def momentum_heads(width: int) -> tuple[nn.Module, nn.Module]:
    """Return projector and predictor of MoCo v3 (Chen, Xie and He 2021, section 4.1): 4096 to 256; 512 to 128."""
    hidden, out = (4096, 256) if width >= WIDE else (512, 128)
    projector = mlp([width, hidden, hidden, out], last_norm=True, last_affine=False)
    return projector, mlp([out, hidden, out], last_norm=True, last_affine=False)


def light_decoder(width: int, grid_size: Sequence[int], out_features: int) -> MAEDecoder:
    """Return MAE's decoder (He et al. 2022): 512 wide and 8 deep; 128 and 2 where narrow."""
    dim, depth, heads = (512, 8, 16) if width >= WIDE else (128, 2, 4)
    return MAEDecoder(width, grid_size, out_features, dim, depth, heads)


class PrototypeHead(nn.Module):
    """Three GELU layers, a bottleneck of norm 1, and prototypes of norm 1 (DINO, Caron et al. 2021, appendix C).

    The prototypes are plain weights that are normalised when they are used: weight normalisation as torch has it does
    not survive a copy or a checkpoint read without unpickling.

    Args:
        width: E.
        prototypes: K; 0 takes 65,536, or 1024 for narrow encoders.
    """

    def __init__(self, width: int, prototypes: int = 0) -> None:
        super().__init__()
        hidden, bottleneck, many = (2048, 256, 65536) if width >= WIDE else (512, 128, 1024)
        self.num_prototypes = prototypes or many
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.layers.apply(init_transformer_weights)
        self.prototypes = nn.Parameter(torch.empty(self.num_prototypes, bottleneck))
        trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines of ``(..., E)`` with the prototypes, ``(..., K)``."""
        return F.normalize(self.layers(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T
