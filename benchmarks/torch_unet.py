"""The UNet of this project in PyTorch: what the speed and the outputs of ours are compared with.

Channels first, (b, c, y, x); attributes carry the names of ours, so that weights can be copied over.
"""

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jax_repaint.nets.layers import sinusoids
from jax_repaint.nets.unet import UNetConfig


class Block(nn.Module):
    """GroupNorm, SiLU, 3x3; scaled and shifted GroupNorm, SiLU, dropout, 3x3; plus the input."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(min(8, inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(min(8, outputs), outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(config.embedding, 2 * outputs)
        self.residual = config.residual
        if config.residual and inputs != outputs:
            self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulate(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.conv2(self.dropout(h))
        if not self.residual:
            return h
        return h + (self.skip(x) if hasattr(self, "skip") else x)


class Attention(nn.Module):
    """x + W softmax(Q K^T / sqrt(d)) V over all cells, after a GroupNorm."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(min(8, channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, ny, nx = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, ny * nx).transpose(-1, -2)
        h = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        return x + self.project(h.transpose(-1, -2).reshape(b, c, ny, nx))


class TorchUNet(nn.Module):
    """eps of a batch of fields (b, inputs, y, x) at whole steps (b,) of a table of `steps` noise levels."""

    def __init__(self, config: UNetConfig, steps: int = 250):
        super().__init__()
        self.config = config
        width, c = config.embedding, config.channels
        self.register_buffer("table", torch.from_numpy(np.array(sinusoids(np.arange(steps), width))))
        self.embed1, self.embed2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def add_blocks(name: str, level: int, inputs: int, outputs: int) -> None:
            for i in range(config.blocks):
                out = outputs if i == config.blocks - 1 else c[min(level, len(c) - 1)]
                setattr(self, f"{name}_{i}", Block(inputs, out, config))
                if level in config.attention:
                    setattr(self, f"{name}_{i}_attention", Attention(out, config.heads))
                inputs = out

        half = config.stem_stride == 2
        if half:
            self.stem = nn.Conv2d(config.inputs, c[0], 4, stride=2, padding=1)
        for k in range(len(c)):
            add_blocks(f"encode{k}", k, c[k - 1] if k else c[0] if half else config.inputs, c[k])
            setattr(self, f"down{k}", nn.Conv2d(c[k], c[k], 4, stride=2, padding=1))
            setattr(self, f"up{k}", nn.ConvTranspose2d(c[k], c[k], 4, stride=2, padding=1))
            add_blocks(f"decode{k}", k, 2 * c[k], c[max(k - 1, 0)])
        add_blocks("middle", len(c), c[-1], c[-1])
        self.out_norm = nn.GroupNorm(min(8, c[0]), c[0])
        self.out = (
            nn.ConvTranspose2d(c[0], config.outputs, 4, stride=2, padding=1)
            if half
            else nn.Conv2d(c[0], config.outputs, 3, padding=1)
        )

    def _level(self, name: str, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for i in range(self.config.blocks):
            h = getattr(self, f"{name}_{i}")(h, embedding)
            if hasattr(self, f"{name}_{i}_attention"):
                h = getattr(self, f"{name}_{i}_attention")(h)
        return h

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        embedding = self.embed2(F.silu(self.embed1(self.table[t])))
        h = self.stem(x) if self.config.stem_stride == 2 else x
        skips = []
        for k in range(len(self.config.channels)):
            h = self._level(f"encode{k}", h, embedding)
            skips.append(h)
            h = getattr(self, f"down{k}")(h)
        h = self._level("middle", h, embedding)
        for k in reversed(range(len(self.config.channels))):
            h = torch.cat([skips[k], getattr(self, f"up{k}")(h)], dim=1)
            h = self._level(f"decode{k}", h, embedding)
        return self.out(F.silu(self.out_norm(h)))

    def count(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def copy_weights(self, params: dict) -> "TorchUNet":
        """Takes over the parameters of our network; every one of its own must be among them."""
        ours = {
            tuple(str(k.key) for k in path): np.array(v, np.float32) for path, v in jax.tree.leaves_with_path(params)
        }
        for name, parameter in self.named_parameters():
            *path, kind = name.split(".")
            if kind == "bias":
                value = ours.pop((*path, "bias"))
            elif parameter.ndim == 1:
                value = ours.pop((*path, "scale"))
            elif parameter.ndim == 2:
                value = ours.pop((*path, "kernel")).T
            elif isinstance(self.get_submodule(".".join(path)), nn.ConvTranspose2d):
                value = ours.pop((*path, "kernel"))[::-1, ::-1].transpose(2, 3, 0, 1)
            else:
                value = ours.pop((*path, "kernel")).transpose(3, 2, 0, 1)
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
        assert not ours, f"PyTorch network lacks {sorted(ours)}"
        return self
