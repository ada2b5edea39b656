"""The models that overhead is measured on: the demo's GPT, and ATTNChecker's four from Hugging Face, at their width.

Each entry makes a model with random weights and a function that gives the batch of a step. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["ATTENTIONS", "MODELS", "SEQUENCE", "WIDTH", "Trained", "build"]

WIDTH = 768
SEQUENCE = 512
"""Tokens of each sequence, of the models from Hugging Face."""


class Trained(NamedTuple):
    """A model and its data."""

    model: torch.nn.Module
    loss: Callable[[Any, int, int], torch.Tensor]
    """Loss of (engine, step, micro_step)."""


def build(name: str, *, attention: str, num_layers: int, batch_size: int, checkpointing: bool) -> Trained:
    """The model `name` of `MODELS`."""
    return _demo() if name == "demo" else _hugging_face(name, attention, num_layers, batch_size, checkpointing)


def _demo() -> Trained:
    sys.path.insert(0, str(Path(__file__).parent / "demo_gpt"))
    from train_gpt import GPT, read_batch, read_text

    text = read_text()

    def loss(engine: Any, step: int, micro_step: int) -> torch.Tensor:
        size, rank = engine.train_micro_batch_size_per_gpu(), torch.distributed.get_rank()
        batch = read_batch(text, size, step=step, micro_step=micro_step, rank=rank).to(engine.device)
        return engine(batch[:, :-1], batch[:, 1:])

    return Trained(GPT(), loss)


def _bert(**options: Any) -> torch.nn.Module:
    import transformers

    return transformers.BertForMaskedLM(transformers.BertConfig(**options))


def _roberta(**options: Any) -> torch.nn.Module:
    import transformers

    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**options, max_position_embeddings=SEQUENCE + 2))


def _gpt2(*, num_hidden_layers: int, **options: Any) -> torch.nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=num_hidden_layers, use_cache=False, **options))


def _gpt_neo(*, num_hidden_layers: int, **options: Any) -> torch.nn.Module:
    import transformers

    config = transformers.GPTNeoConfig(
        hidden_size=WIDTH,
        num_layers=num_hidden_layers,
        num_heads=12,
        attention_types=[[["global", "local"], num_hidden_layers // 2]],
        max_position_embeddings=SEQUENCE,
        use_cache=False,
        **options,
    )
    return transformers.GPTNeoForCausalLM(config)


_MAKERS = {"bert": _bert, "gpt2": _gpt2, "gpt-neo": _gpt_neo, "roberta": _roberta}
MODELS = ("demo", *_MAKERS)
ATTENTIONS = ("eager", "sdpa", "fused")
"""PyTorch's SDPA has no fused kernel with dropout on a CPU: `fused` is SDPA without dropout in attention."""

_WITHOUT_DROPOUT = {
    "bert": {"attention_probs_dropout_prob": 0.0},
    "gpt2": {"attn_pdrop": 0.0},
    "roberta": {"attention_probs_dropout_prob": 0.0},
}
"""In attention, by model."""


def _hugging_face(name: str, attention: str, num_layers: int, batch_size: int, checkpointing: bool) -> Trained:
    options = _WITHOUT_DROPOUT[name] if attention == "fused" else {}
    implementation = "eager" if attention == "eager" else "sdpa"
    model = _MAKERS[name](num_hidden_layers=num_layers, attn_implementation=implementation, **options)
    if checkpointing:
        model.gradient_checkpointing_enable()

    def loss(engine: Any, step: int, micro_step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + micro_step)
        tokens = torch.randint(5, 30000, (batch_size, SEQUENCE), generator=generator).to(engine.device)
        result: torch.Tensor = engine(input_ids=tokens, labels=tokens).loss
        return result

    return Trained(model, loss)
