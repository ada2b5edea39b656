"""Small models and a striker for the tests of detection. Nothing here knows a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from resilience.abft.protection import Protection
from tests.protections import installing


class Striker:
    """Has the interface of `resilience.faults.tensor.TensorInjector`; strikes one address `repeat` times."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[tuple[str, int]] = []
        self._left = 0
        self._address: tuple[str, int] = ("", -1)
        self._corrupt: Callable[[torch.Tensor], None] = lambda tensor: None

    def arm(self, site: str, layer: int, corrupt: Callable[[torch.Tensor], None], *, repeat: int = 1) -> None:
        self._address, self._corrupt, self._left, self.armed = (site, layer), corrupt, repeat, True

    @property
    def num_left(self) -> int:
        return self._left

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int | None = None) -> bool:
        self.seen.append((site, layer))
        if (site, layer) != self._address or self._left == 0:
            return False
        self._left -= 1
        self._corrupt(tensor)
        return True


class CausalSelfAttention(nn.Module):
    """Eager (matmul, softmax, matmul) or fused attention over (batch, length, width)."""

    def __init__(self, width: int, heads: int, *, fused_projection: bool, sdpa: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.sdpa = heads, sdpa
        if fused_projection:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.fused_projection = fused_projection
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = (
            self.qkv(x).split(width, -1) if self.fused_projection else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            y = self.dropout(scores.masked_fill(future, float("-inf")).softmax(-1)) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """A byte-level GPT; `checkpointing` is None, "reentrant" or "non_reentrant"."""

    def __init__(
        self,
        *,
        layers: int = 2,
        width: int = 32,
        heads: int = 4,
        vocabulary: int = 50,
        fused_projection: bool = True,
        sdpa: bool = False,
        dropout: float = 0.1,
        checkpointing: str | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.attentions = nn.ModuleList(
            CausalSelfAttention(width, heads, fused_projection=fused_projection, sdpa=sdpa, dropout=dropout)
            for _ in range(layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.checkpointing = checkpointing

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attentions[index](self.norms[index](x))
        return x + self.mlps[index](x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for index in range(len(self.attentions)):
            if self.checkpointing is None:
                x = self.block(index, x)
            else:
                x = checkpoint(self.block, index, x, use_reentrant=self.checkpointing == "reentrant")
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens.flatten())


@pytest.fixture(scope="session")
def gpt() -> type[GPT]:
    return GPT


@pytest.fixture
def striker() -> Striker:
    return Striker()


@pytest.fixture
def protect(striker: Striker) -> Iterator[Callable[..., Protection]]:
    """Make installed protections with the striker in them; removed after the test."""
    with installing() as make:
        yield lambda *, clock=None, **settings: make(settings, striker, clock)
