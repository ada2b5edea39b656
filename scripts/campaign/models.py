"""The models of the fault-injection campaign: GPT-2 and Llama of transformers, from config, trained for some steps.

Small, so that a trial takes about a millisecond, yet with reductions of 128 to 512 as larger ones have in a head. No
dropout: every step of a model must give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import transformers

__all__ = ["DTYPES", "MODELS", "Setting", "Subject", "batches", "build", "optimizer_of", "settings"]

MODELS = ("gpt2", "llama")
ATTENTIONS = ("eager", "sdpa")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

VOCABULARY, LENGTH, BATCH, WIDTH = 256, 64, 2, 128
WARM_UP_STEPS = 30


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One model in one form."""

    model: str
    attention: str
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A model with the batch that its steps are run on."""

    model: Any
    tokens: torch.Tensor

    def step(self) -> torch.Tensor:
        """One forward and backward pass; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss: torch.Tensor = self.model(self.tokens, labels=self.tokens).loss
        loss.backward()
        return loss.detach()

    def result(self) -> list[torch.Tensor]:
        """Loss and gradients of one step."""
        loss = self.step()
        return [loss, *(parameter.grad for parameter in self.model.parameters())]


def settings() -> list[Setting]:
    return [Setting(model, attention, dtype) for dtype in DTYPES for model in MODELS for attention in ATTENTIONS]


def build(setting: Setting) -> Subject:
    """The model of a setting after some training steps, always the same."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": setting.attention,
    }  # fmt: skip
    if setting.model == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=4, n_embd=WIDTH, n_positions=LENGTH, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            **common,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                max_position_embeddings=LENGTH,
                **common,
            )
        )
    model = model.to(DTYPES[setting.dtype]).train()
    data = batches()
    optimizer = optimizer_of(model)
    for _ in range(WARM_UP_STEPS):
        Subject(model, next(data)).step()
        optimizer.step()
    return Subject(model, next(data))


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches() -> Iterator[torch.Tensor]:
    """Token sequences that a model can learn something from: each counts up by a step of its own."""
    generator = torch.Generator().manual_seed(1)
    while True:
        start, stride = (torch.randint(0, VOCABULARY, (BATCH, 1), generator=generator) for _ in range(2))
        yield (start + stride * torch.arange(LENGTH)) % VOCABULARY
