"""Sites and layers of the operations of real models, forward and backward."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from resilience.abft.protection import Protection

TOKENS = torch.arange(2 * 12).reshape(2, 12) % 40
EAGER = {
    "attention.scores": 2,
    "attention.probs": 2,
    "attention.context": 2,
    "attention.dq": 2,
    "attention.dk": 2,
    "attention.dp": 2,
    "attention.ds": 2,
    "attention.dv": 2,
}


def labels_of(protection: Protection, striker: Any, model: nn.Module, run: Any) -> list[tuple[str, int]]:
    """(site, layer) of every operation of one forward and backward, in order."""
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    striker.arm("nowhere", 0, lambda tensor: None)
    striker.seen.clear()
    with protection.active():
        run().backward()
    assert protection.drain() == []
    return list(striker.seen)


def numbered(labels: list[tuple[str, int]], site: str) -> list[int]:
    return [layer for name, layer in labels if name == site]


def count_nodes_to(number: int) -> None:
    """Make nodes in this thread until the next one has this number."""
    leaf = torch.zeros(1, requires_grad=True)
    while torch._C._autograd._get_sequence_nr() < number:
        leaf.view(1)


def gpt2(implementation: str) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0,
        attn_implementation=implementation,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(implementation: str) -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=24,
        vocab_size=40, attn_implementation=implementation,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("fused", [True, False])
def test_a_plain_gpt(gpt: Any, protect: Any, striker: Any, fused: bool) -> None:
    model = gpt(fused_projection=fused)
    labels = labels_of(protect(), striker, model, lambda: model(TOKENS))
    num_linear = 2 * (4 if fused else 6) + 1
    projections = {"attention.q": 2} if fused else {"attention.q": 2, "attention.k": 2, "attention.v": 2}
    assert Counter(site for site, _ in labels) == {
        **EAGER, **projections, "attention.out": 2, "linear.out": 5,
        "linear.dgrad": num_linear, "linear.wgrad": num_linear,
    }  # fmt: skip
    forward = [label for label in labels if label[0] not in ("linear.dgrad", "linear.wgrad")]
    assert forward[: 5 if fused else 7][-4:] == [
        ("attention.scores", 0), ("attention.probs", 0), ("attention.context", 0), ("attention.out", 0),
    ]  # fmt: skip
    assert numbered(labels, "linear.out") == [0, 1, 2, 3, 4]
    assert numbered(labels, "attention.dq") == [1, 0]
    assert numbered(labels, "linear.wgrad") == list(reversed(range(num_linear)))


class Mixer(nn.Module):
    """Attention in a module whose name does not say so, and a softmax that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        mixed = (q @ k.mT / 4.0 + 0.1).softmax(-1) @ v
        return mixed * self.gate(x).softmax(-1).amax(-1, keepdim=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_softmax_of_what_a_batched_product_gave(protect: Any, striker: Any, compiled: bool) -> None:
    model, x = Mixer(), torch.randn(2, 12, 16)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    counts = Counter(site for site, _ in labels_of(protect(), striker, model, lambda: called(x).square().mean()))
    assert (counts["attention.probs"], counts["attention.ds"]) == (1, 1)
    assert counts["matmul"] == 6, "scores, context, and two gradients of each"


@functorch_config.patch(donated_buffer=False)  # or a graph cannot be kept
def test_each_pass_through_a_compiled_graph_has_its_labels(protect: Any) -> None:
    model, protection = Mixer(), protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        loss = torch.compile(model, backend="aot_eager")(torch.randn(2, 12, 16)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert protection.checks()["attention.ds"] == 2


@pytest.mark.parametrize("make", [gpt2, llama])
def test_hugging_face_eager(protect: Any, striker: Any, make: Any) -> None:
    model = make("eager").train()
    labels = labels_of(protect(), striker, model, lambda: model(TOKENS, labels=TOKENS).loss)
    counts = Counter(site for site, _ in labels)
    for site, count in EAGER.items():
        assert counts[site] == count, site
    assert counts["attention.q"] == counts["attention.out"] == 2
    assert counts["attention.k"] == counts["attention.v"] == (0 if make is gpt2 else 2)
    assert counts["linear.out"] == (5 if make is gpt2 else 7)
    assert counts["linear.dgrad"] == counts["linear.wgrad"] == (9 if make is gpt2 else 15)
    assert counts["matmul"] == 0


@pytest.mark.parametrize("make", [gpt2, llama])
def test_hugging_face_fused(protect: Any, striker: Any, make: Any) -> None:
    model = make("sdpa").eval()
    labels = labels_of(protect(), striker, model, lambda: model(TOKENS, labels=TOKENS).loss)
    counts = Counter(site for site, _ in labels)
    assert (
        counts["attention.context"] == counts["attention.dq"] == counts["attention.dk"] == counts["attention.dv"] == 2
    )
    assert counts["attention.scores"] == counts["attention.probs"] == 0
    assert numbered(labels, "attention.dv") == [1, 0]


@pytest.mark.parametrize("with_weights", [True, False])
def test_multihead_attention(protect: Any, striker: Any, with_weights: bool) -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.0)
    x = torch.randn(2, 9, 16)
    labels = labels_of(
        protect(), striker, nn.Sequential(module), lambda: module(x, x, x, need_weights=with_weights)[0].square().mean()
    )
    counts = Counter(site for site, _ in labels)
    assert counts["attention.q"] == counts["attention.context"] == counts["attention.out"] == 1
    assert counts["attention.scores"] == (1 if with_weights else 0)
    assert counts["linear.dgrad"] == 1, "the input needs no gradient"
    assert counts["linear.wgrad"] == 2


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_a_recomputation_keeps_the_numbers_of_its_forward(gpt: Any, protect: Any, striker: Any, kind: str) -> None:
    model = gpt(layers=3, checkpointing=kind)
    labels = labels_of(protect(), striker, model, lambda: model(TOKENS))
    # Forward 0, 1, 2; then each block is recomputed just before its backward.
    assert numbered(labels, "attention.scores") == [0, 1, 2, 2, 1, 0]
    assert numbered(labels, "attention.dq") == [2, 1, 0]
    assert numbered(labels, "attention.dv") == [2, 1, 0]
    assert sorted(numbered(labels, "linear.wgrad")) == list(range(13))
    recomputed = labels.index(("attention.scores", 2), labels.index(("attention.scores", 2)) + 1)
    assert recomputed < labels.index(("attention.dq", 2)) < labels.index(("attention.dq", 1))


@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant"])
def test_a_backward_in_its_own_thread_keeps_the_labels(gpt: Any, protect: Any, striker: Any, kind: str | None) -> None:
    """As on a GPU, where autograd's thread counts the nodes of a recomputation, the script's thread all others."""
    model, found = gpt(layers=3, checkpointing=kind), []
    for num_threads in (1, 2):
        protection = protect()
        protection.attach(model)
        striker.arm("nowhere", 0, lambda tensor: None)
        striker.seen.clear()

        def active(run: Any, protection: Protection = protection) -> Any:
            with protection.active():
                return run()

        pools = [ThreadPoolExecutor(1) for _ in range(num_threads)]
        for step in range(16):
            protection.begin_micro_step(step, 0, 0)
            # In some steps a product of one thread and one of the other then have the same number.
            count = max(pool.submit(torch._C._autograd._get_sequence_nr).result() for pool in pools)
            pools[0].submit(count_nodes_to, count).result()
            pools[-1].submit(count_nodes_to, count + step).result()
            loss = pools[0].submit(active, lambda: model(TOKENS)).result()
            pools[-1].submit(active, loss.backward).result()
            assert protection.drain() == []
        for pool in pools:
            pool.shutdown()
        protection.uninstall()
        found.append((list(striker.seen), protection.checks()))
    assert found[0] == found[1]


def test_a_module_that_is_used_twice_takes_its_numbers_backwards(protect: Any, striker: Any) -> None:
    shared = nn.Linear(6, 6)
    x = torch.randn(4, 6, requires_grad=True)

    def run() -> torch.Tensor:
        y = checkpoint(shared, x, use_reentrant=False)
        y = checkpoint(shared, y.relu(), use_reentrant=False)
        return y.square().mean()

    labels = labels_of(protect(), striker, nn.Sequential(shared), run)
    assert numbered(labels, "linear.out") == [0, 1]
    assert numbered(labels, "linear.wgrad") == [1, 0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 3), (6, 6, 6), (8, 3, 8), (3, 8, 3)], ids=str)
def test_which_gradient_a_product_is(protect: Any, striker: Any, shape: tuple[int, int, int], bias: bool) -> None:
    """The rule for square products is autograd's order; here it is held against the values themselves."""
    m, k, n = shape
    module = nn.Linear(k, n, bias=bias)
    x = torch.randn(m, k, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None
    gradients = {"linear.dgrad": x.grad.clone(), "linear.wgrad": module.weight.grad.clone()}
    found: dict[str, torch.Tensor] = {}
    original = striker.strike

    def keep(site: str, layer: int, tensor: torch.Tensor, call: int | None = None) -> bool:
        found[site] = tensor.clone()
        return bool(original(site, layer, tensor))

    striker.strike = keep
    labels_of(protect(), striker, nn.Sequential(module), lambda: module(x).square().sum())
    for site, gradient in gradients.items():
        assert any(torch.equal(found[site], g) for g in (gradient, gradient.t())), site


@pytest.mark.parametrize("form", ["bmm", "baddbmm"])
def test_which_gradient_a_square_batched_product_is(protect: Any, striker: Any, form: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Identity()

        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            if form == "bmm":
                return torch.bmm(q, k.mT)
            return torch.baddbmm(torch.zeros(1, 8, 8), q, k.mT)

    module = Attention()
    q, k = (torch.randn(2, 8, 8, requires_grad=True) for _ in range(2))
    module(q, k).square().sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    expected = {"attention.dq": q.grad.clone(), "attention.dk": k.grad.clone()}
    found: dict[str, torch.Tensor] = {}
    striker.strike = lambda site, layer, tensor, call=None: bool(found.update({site: tensor.clone()}))
    labels_of(protect(), striker, module, lambda: module(q, k).square().sum())
    for site, gradient in expected.items():
        assert any(torch.equal(found[site], g) for g in (gradient, gradient.mT)), site


def test_layers_count_from_zero_in_every_micro_step(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt()
    protection = protect()
    first = labels_of(protection, striker, model, lambda: model(TOKENS))
    assert labels_of(protection, striker, model, lambda: model(TOKENS)) == first


def test_backward_of_an_earlier_micro_step_keeps_its_labels(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt()
    protection = protect()
    protection.attach(model)
    striker.arm("nowhere", 0, lambda tensor: None)
    losses = []
    for micro_step in range(2):
        protection.begin_micro_step(1, micro_step, 0)
        with protection.active():
            losses.append(model(TOKENS))
    striker.seen.clear()
    with protection.active():
        losses[0].backward()
    assert numbered(striker.seen, "attention.dq") == [1, 0]


def test_an_exception_in_a_module_leaves_no_label_behind(gpt: Any, protect: Any, striker: Any) -> None:
    model = gpt()
    protection = protect()
    protection.attach(model)
    with protection.active(), pytest.raises(RuntimeError):
        model.attentions[0](torch.randn(2, 3, 5))
    striker.arm("nowhere", 0, lambda tensor: None)
    with protection.active():
        torch.randn(3, 4) @ torch.randn(4, 2)
    assert striker.seen[-1][0] == "matmul"


@pytest.mark.parametrize("before", ["raises", "without_gradients"])
def test_a_forward_that_does_not_count_takes_no_numbers(gpt: Any, protect: Any, striker: Any, before: str) -> None:
    """One that runs out of memory and is tried again, or an evaluation in the middle of a micro-step."""
    model = gpt(layers=2, checkpointing="non_reentrant")
    protection = protect()
    expected = labels_of(protection, striker, model, lambda: model(TOKENS))

    def run() -> torch.Tensor:
        if before == "raises":
            handle = model.mlps[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(TOKENS)
            handle.remove()
        else:
            with torch.no_grad():
                model(TOKENS)
        striker.seen.clear()
        return model(TOKENS)

    assert labels_of(protection, striker, model, run) == expected


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_script_module_that_is_named_linear_is_no_defect(protect: Any) -> None:
    """It keeps its parameters elsewhere than other modules do."""

    class ScriptedLinear(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        @torch.jit.script_method
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    model, protection = nn.Sequential(ScriptedLinear()), protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        model(torch.randn(2, 4)).sum().backward()
    assert protection.num_failed_checks() == 0
    assert protection.unprotected() == {}
