"""Symbols for samples, by which a stock scheduler's step is traced."""

import numpy as np
import pytest
import torch

from fastdiff.integrations.diffusers.linear_step import NotLinear, SampleForm


def test_forms_do_what_tensors_do():
    """Every operation that forms know, against the tensors they stand for."""
    shape = torch.Size((2, 3))
    a, b = torch.randn(2, *shape, dtype=torch.float64).unbind()
    half = torch.tensor(0.5)
    programs = [
        lambda x, y: half * x - y / 3 + 0,
        lambda x, y: (1 - half) * y - half * x,
        lambda x, y: -(x - y * half) / torch.tensor([[2.0]]),
        lambda x, y: np.float64(1.5) * x + y.to(torch.float32).to(torch.float64),
        lambda x, y: torch.mul(half, x) + torch.add(x, y) - torch.sub(x, y),
        lambda x, y: torch.zeros_like(x) + y,
    ]
    for program in programs:
        form = program(*(SampleForm({(n,): 1.0}, shape, torch.float64) for n in "ab"))
        found = sum(weight * {"a": a, "b": b}[s[0]] for s, weight in form.terms.items())
        wanted = program(a, b)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x * x,
        lambda x: 1 / x,
        lambda x: x + 1,
        lambda x: x.abs(),
        lambda x: torch.exp(x),
        lambda x: x[:, :1],
        lambda x: torch.quantile(x, 0.5),
        lambda x: x if x else x,
        lambda x: x * torch.randn(2, 3),
        lambda x: x.clamp(-1, 1).clamp(-1, 1),
    ],
)
def test_what_forms_cannot_do_is_said(program):
    with pytest.raises(NotLinear):
        program(SampleForm({("a",): 1.0}, torch.Size((2, 3)), torch.float32))
