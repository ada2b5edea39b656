"""The attention kernels against the oracle, forward and backward, over shapes, masks and dtypes; clean residuals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resilience.kernels.attention import api
from resilience.kernels.attention.oracle import attend
from resilience.kernels.attention.tiling import Launch, Tiling
from tests.kernels.attention_cases import Case, largest_error

UNEQUAL = Tiling(forward=Launch(16, 32, 4, 1), dq=Launch(32, 16, 4, 1), dkdv=Launch(32, 16, 4, 1), num_columns=16)
OTHERWISE = Tiling(forward=Launch(32, 16, 4, 1), dq=Launch(16, 32, 4, 1), dkdv=Launch(16, 32, 4, 1), num_columns=8)

SHAPES = {
    "odd causal": {"length_q": 37, "causal": True},
    "odd": {"length_q": 37, "head_dim": 24},
    "grouped heads": {"heads": 4, "key_heads": 2, "length_q": 19, "causal": True},
    "one key head": {"heads": 3, "key_heads": 1, "length_q": 17, "batch": 2, "dtype": torch.float16},
    "more keys": {"length_q": 5, "length_k": 33, "causal": True},
    "more queries": {"length_q": 35, "length_k": 18, "causal": True, "dtype": torch.float16},
    "two positions": {"length_q": 2},
    "head dimension 96": {"length_q": 18, "head_dim": 96},
    "wide head": {"length_q": 17, "head_dim": 136, "causal": True},
    "unequal tiles": {"length_q": 50, "causal": True, "tiling": UNEQUAL},
    "unequal tiles otherwise": {"length_q": 50, "causal": True, "tiling": OTHERWISE},
    "whole tiles": {"length_q": 32, "causal": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_attention(device: torch.device, shape: str) -> None:
    case = Case.random(device, **SHAPES[shape])
    exact = case.oracle()
    ring = api.Ring(device)
    run = case.forward(api.Checks(), ring)
    torch.testing.assert_close(run.lse.double(), exact.lse, atol=2e-6, rtol=1e-6)
    assert largest_error(run.out, exact.out) < 6
    gradients = case.backward(run, api.Checks(), ring)
    for name in ("dq", "dk", "dv"):
        assert largest_error(getattr(gradients, name), getattr(exact, name)) < 12, name
    assert ring.drain() == ([], 0)


def test_checks_change_no_bit(device: torch.device) -> None:
    case = Case.random(device, length_q=37, heads=2, key_heads=1, causal=True)
    plain, ring = case.forward(), api.Ring(device)
    checked = case.forward(api.Checks(), ring)
    assert torch.equal(plain.out, checked.out)
    assert torch.equal(plain.lse, checked.lse)
    without, with_checks = case.backward(plain), case.backward(checked, api.Checks(), ring)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(getattr(without, name), getattr(with_checks, name)), name


def test_strided_operands_are_read_and_written_where_they_lie(device: torch.device) -> None:
    case = Case.random(device, heads=2, length_q=19, batch=2)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v, case.d_out)]
    strided = Case(*moved)
    expected, run = case.forward(), strided.forward()
    assert torch.equal(run.out, expected.out)
    assert run.out.stride() == strided.q.stride()
    gradients, ours = case.backward(expected), strided.backward(run)
    assert torch.equal(ours.dk, gradients.dk)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_attended_apart(device: torch.device, causal: bool) -> None:
    lengths = [(17, 17), (0, 4), (5, 0), (3, 20)]
    starts = [torch.tensor([0, *side]).cumsum(0).to(device, torch.int32) for side in zip(*lengths, strict=True)]
    generator = torch.Generator().manual_seed(3)
    num_q, num_k = (int(start[-1]) for start in starts)
    shapes = ((num_q, 2, 16), (num_k, 1, 16), (num_k, 1, 16), (num_q, 2, 16))
    tensors = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    packed = api.Packed(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_q=17, max_k=20)
    case = Case(*tensors, causal=causal, packed=packed)
    ring = api.Ring(device)
    run = case.forward(api.Checks(), ring)
    gradients = case.backward(run, api.Checks(), ring)
    assert ring.drain() == ([], 0)
    for (q0, q1), (k0, k1) in zip(*(zip(s.tolist(), s.tolist()[1:], strict=False) for s in starts), strict=True):
        sides = ((q0, q1), (k0, k1), (k0, k1), (q0, q1))
        parts = [x[a:b].transpose(0, 1)[None].double() for x, (a, b) in zip(tensors, sides, strict=True)]
        exact = attend(*parts, causal=causal)
        ours = {"out": run.out[q0:q1], "dq": gradients.dq[q0:q1], "dk": gradients.dk[k0:k1], "dv": gradients.dv[k0:k1]}
        for name, tensor in ours.items():
            expected = getattr(exact, name)[0].transpose(0, 1)
            torch.testing.assert_close(tensor.double(), expected, atol=0.03, rtol=0.02, msg=f"{name} {q0}:{q1}")


def _shifted(x: torch.Tensor) -> torch.Tensor:
    return x + 2


def _heavy(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + 30 * (x.float().abs() > 2.2))


KINDS = {
    "normal": (lambda x: x, lambda x: x),
    "shifted": (_shifted, _shifted),
    "heavy tails": (_heavy, _heavy),
    "zeros": (torch.zeros_like, torch.zeros_like),
    "large scores": (lambda x: x * 12, lambda x: x),
    "tiny": (lambda x: x * 1e-3, lambda x: x * 1e-6),
    "large": (lambda x: x, lambda x: x * 20),
    "one row dominates": (lambda x: x * (1 + 40 * (torch.arange(x.shape[2], device=x.device) == 7))[:, None],) * 2,
}
"""What is done to normal q and k, and to normal v and dO."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_clean_residuals_stay_below_their_tolerances(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    large = Launch(64, 64, 4, 1)
    tiling = Tiling(forward=large, dq=large, dkdv=large, num_columns=8)
    case = Case.random(device, length_q=190, head_dim=64, causal=True, dtype=dtype, seed=1, tiling=tiling)
    of_keys, of_values = KINDS[kind]
    tensors = (of_keys(case.q), of_keys(case.k), of_values(case.v), of_values(case.d_out))
    case = dataclasses.replace(case, **dict(zip(("q", "k", "v", "d_out"), (x.to(dtype) for x in tensors), strict=True)))
    ring = api.Ring(device)
    run = case.forward(api.Checks(max_repairs=0), ring)
    gradients = case.backward(run, api.Checks(max_repairs=0), ring)
    for status in (run.status, gradients.dq_status, gradients.dkdv_status):
        worst = float(status[:, 1].view(torch.float32).max())
        assert worst <= 0.5, f"{worst} {ring.drain()}"
    assert ring.drain() == ([], 0)


def test_round_off_of_long_sums_is_no_alarm(device: torch.device) -> None:
    """Keys and values with a common mean: sums over 256 tiles of keys grow, and their round-off with them."""
    launch = Launch(16, 16, 4, 1)
    # In the interpreter, where tiles cost time and no memory, one of 1024 keys; no device's shared memory holds that.
    of_keys = launch if device.type == "cuda" else Launch(16, 1024, 4, 1)
    tiling = Tiling(forward=launch, dq=launch, dkdv=of_keys, num_columns=8)
    case = Case.random(device, length_q=16, length_k=4096, head_dim=64, seed=2, tiling=tiling)
    case = dataclasses.replace(case, q=case.q + 4, k=case.k + 4, v=case.v + 4, d_out=case.d_out + 4)
    ring, checks = api.Ring(device), api.Checks(max_repairs=0)
    run = case.forward(checks, ring)
    gradients = case.backward(run, checks, ring)
    for status in (run.status, gradients.dq_status, gradients.dkdv_status):
        worst = float(status[:, 1].view(torch.float32).max())
        assert worst <= 0.5, f"{worst} {ring.drain()}"
