"""The latent codec of the miniature: a linear one.

4 × 4 pixel patches on their first 16 principal components. The pictures are flat colour, so a basis fitted in a
second reconstructs them better than an autoencoder trained for an hour. It is a diffusers model with the interface of
`AutoencoderKL`, so the stock pipelines take it as their `vae`.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Linear patch codec.

    Args:
        latent_channels: Kept components of a 4 × 4 × 3 patch.
        block_out_channels: Only its length counts: pipelines derive the factor 4 = 2 ** (3 - 1) from it.
        scaling_factor: As in `AutoencoderKL`; 1, since the basis is scaled to unit variance.
        shift_factor: As in `AutoencoderKL`; 0.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (1, 1, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch = 2 ** (len(block_out_channels) - 1)
        inputs = 3 * self.patch**2
        self.mean = nn.Parameter(torch.zeros(inputs), requires_grad=False)
        self.analysis = nn.Parameter(torch.eye(latent_channels, inputs), requires_grad=False)
        self.synthesis = nn.Parameter(torch.eye(inputs, latent_channels), requires_grad=False)

    def fit(self, pixels: NDArray[np.uint8], power: float = 0.6) -> float:
        """Set the basis from pictures.

        Args:
            pixels: RGB, shape (n, height, width, 3).
            power: Component i is divided by its standard deviation to this power, then all by one number that
                makes their variance 1 in the mean: fine detail keeps some weight without becoming noise.

        Returns:
            Peak signal-to-noise ratio of the fitted pictures, in decibels.
        """
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        patches = F.pixel_unshuffle(x, self.patch).permute(0, 2, 3, 1).reshape(-1, self.mean.numel())
        self.mean.copy_(patches.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T.double()))
        keep = self.analysis.shape[0]
        std = values.flip(0)[:keep].clamp_min(1e-9).sqrt()
        basis = vectors.flip(1)[:, :keep].T
        scale = std ** (1 - power)
        scale = std**power * (scale.square().mean().sqrt())
        self.analysis.copy_((basis / scale[:, None]).float())
        self.synthesis.copy_((basis * scale[:, None]).T.float())
        posterior = self.encode(x, return_dict=False)[0]
        error = (self.decode(posterior.mode(), return_dict=False)[0].clamp(-1, 1) - x).square().mean()
        return float(10 * torch.log10(4 / error))

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pixels (batch, 3, H, W) in [-1, 1] → a deterministic distribution over (batch, channels, H/4, W/4)."""
        patches = F.pixel_unshuffle(x, self.patch).movedim(1, -1) - self.mean
        z = (patches @ self.analysis.T).movedim(-1, 1)
        posterior = DiagonalGaussianDistribution(torch.cat([z, torch.zeros_like(z)], 1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: object = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (batch, channels, h, w) → pixels (batch, 3, 4h, 4w)."""
        patches = z.movedim(1, -1) @ self.synthesis.T + self.mean
        x = F.pixel_shuffle(patches.movedim(-1, 1), self.patch)
        return DecoderOutput(sample=x) if return_dict else (x,)
