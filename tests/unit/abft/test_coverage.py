"""Every GEMM that a model executes is checked: counted independently, by a dispatch mode, in calls and in FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resilience.abft import handlers

TOKENS = torch.arange(2 * 12).reshape(2, 12) % 40
aten = torch.ops.aten
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.addmm_,
    aten.baddbmm_,
    aten.mv,
    aten.addmv,
    aten.dot,
    aten.addbmm,
}
FUSED = {aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward}


class Count(TorchDispatchMode):
    """Counts products and fused attentions, and the multiplications of the former."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.fused = self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in PRODUCTS:
            self.products += 1
            inner = args[1] if len(args) > 2 else args[0]
            self.multiplications += result.numel() * inner.shape[-1]
        self.fused += packet in FUSED
        return result


@contextmanager
def checked_multiplications(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The multiplications of every GEMM that reaches a check."""
    seen: list[int] = []
    check = handlers.GemmHandlers._check

    def counting(self: Any, label: Any, gemm: Any, out: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(out.numel() * gemm.k)
        return check(self, label, gemm, out, *rest)

    monkeypatch.setattr(handlers.GemmHandlers, "_check", counting)
    yield seen


def plain(gpt: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = gpt()
    return model, lambda: model(TOKENS)


def plain_checkpointed(gpt: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = gpt(checkpointing="non_reentrant")
    return model, lambda: model(TOKENS)


def fused(gpt: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = gpt(sdpa=True)
    return model, lambda: model(TOKENS)


def hugging_face(name: str, implementation: str) -> Callable[[Any], tuple[nn.Module, Callable[[], torch.Tensor]]]:
    def make(gpt: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        if name == "gpt2":
            model: Any = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    n_layer=2,
                    n_head=2,
                    n_embd=16,
                    vocab_size=40,
                    n_positions=16,
                    bos_token_id=0,
                    eos_token_id=0,
                    attn_implementation=implementation,
                )
            )
        else:
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    hidden_size=16,
                    intermediate_size=24,
                    vocab_size=40,
                    attn_implementation=implementation,
                )
            )
        return model, lambda: model(TOKENS, labels=TOKENS).loss

    return make


def transformer_layer(gpt: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 9, 16, requires_grad=True)
    return module, lambda: module(x).square().mean()


def einsum(gpt: Any) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    module = nn.ParameterList([nn.Parameter(torch.randn(4, 5, 6))])
    x = torch.randn(3, 4, 5)
    return module, lambda: torch.einsum("bij,ijk->bk", x, module[0]).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        plain, plain_checkpointed, fused, hugging_face("gpt2", "eager"), hugging_face("gpt2", "sdpa"),
        hugging_face("llama", "eager"), hugging_face("llama", "sdpa"), transformer_layer, einsum,
    ],
    ids=["gpt", "gpt-checkpointed", "gpt-sdpa", "gpt2", "gpt2-sdpa", "llama", "llama-sdpa", "encoder", "einsum"],
)  # fmt: skip
def test_every_product_is_checked(
    gpt: Any, protect: Any, monkeypatch: pytest.MonkeyPatch, make: Any, dtype: torch.dtype
) -> None:
    model, run = make(gpt)
    if not isinstance(model, nn.TransformerEncoderLayer | nn.ParameterList):
        model.to(dtype)
    run().backward()
    protection = protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with checked_multiplications(monkeypatch) as checked, Count() as count, protection.active():
        run().backward()
    checks = protection.checks()
    softmaxes = checks.pop("attention.probs", 0)
    assert count.products > 0
    assert sum(checks.values()) == count.products + count.fused
    assert len(checked) == count.products
    assert sum(checked) == count.multiplications
    assert softmaxes == checks.get("attention.scores", 0)
    assert protection.drain() == []
