"""Models that nobody here wrote: what share of their steps is protected, and how each product is named."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from resilience.abft.coverage import CoverageReport, coverage

TOKENS = torch.arange(2 * 12).reshape(2, 12) % 40
SIZES: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ENCODER: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 32, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def build(name: str, attention: str) -> nn.Module:
    common = {**SIZES, "attn_implementation": attention}
    match name:
        case "bert":
            return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, **common))
        case "roberta":
            return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER, **common))
        case "gpt2":
            config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, attn_pdrop=0.0, **common)
            return transformers.GPT2LMHeadModel(config)
        case "gpt_neo":
            config = transformers.GPTNeoConfig(
                num_layers=2, num_heads=2, hidden_size=16, max_position_embeddings=32, window_size=4,
                attention_types=[[["global", "local"], 1]], attention_dropout=0.0, **common,
            )  # fmt: skip
            return transformers.GPTNeoForCausalLM(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=24,
        **common,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def layers_by_site(report: CoverageReport) -> dict[str, list[int]]:
    layers = defaultdict(list)
    for operation in report.operations:
        layers[operation.site].append(operation.layer)
    return {site: sorted(numbers) for site, numbers in layers.items()}


# GPT-Neo has no form with fused attention.
MODELS = [
    *((name, attention) for name in ("bert", "gpt2", "roberta", "llama") for attention in ("eager", "sdpa")),
    ("gpt_neo", "eager"),
]
NUM_OTHER_LINEAR = {"bert": 6, "roberta": 6, "gpt2": 5, "gpt_neo": 5, "llama": 7}
"""Of two blocks' feed-forward parts and the head."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_every_flop_is_protected_and_named(name: str, attention: str, dtype: torch.dtype) -> None:
    model: Any = build(name, attention).train().to(dtype)
    report = coverage(lambda: model(TOKENS, labels=TOKENS).loss.backward(), model)
    assert report.share >= 0.99
    assert report.unprotected == (), str(report)
    layers = layers_by_site(report)
    joined = name == "gpt2"  # one product for q, k and v
    projections = ("attention.q", "attention.out") if joined else ("attention.q", "attention.k", "attention.v")
    for site in (*projections, "attention.out", "attention.context"):
        assert layers[site] == [0, 1], site
    assert layers["attention.scores"] == ([0, 1] if attention == "eager" else [0, 0, 1, 1])
    for site in ("attention.dq", "attention.dk", "attention.dp", "attention.dv"):
        assert layers[site] == [0, 1], site
    assert layers["linear.out"] == list(range(NUM_OTHER_LINEAR[name]))
    num_linear = NUM_OTHER_LINEAR[name] + 2 * (2 if joined else 4)
    assert layers["linear.dgrad"] == layers["linear.wgrad"] == list(range(num_linear))
    assert "matmul" not in layers
    assert ("invariants" in {operation.check for operation in report.operations}) is (attention == "sdpa")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    model: Any = build("llama", "eager").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # The reentrant form wants an input that has a gradient.
    model.enable_input_require_grads()
    report = coverage(lambda: model(TOKENS, labels=TOKENS).loss.backward(), model)
    assert report.share == 1.0
    layers = layers_by_site(report)
    assert layers["attention.scores"] == layers["attention.q"] == [0, 0, 1, 1], "the blocks run twice"
    assert layers["attention.dq"] == layers["attention.dv"] == [0, 1]
    assert layers["linear.wgrad"] == list(range(15))
