"""The eager sampler over shapes, memory layouts and dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdiff import Sampler, solver_names
from tests.helpers.networks import STRUCTURES, affine, gaussian
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal


@pytest.mark.parametrize("solver", STRUCTURES)
@pytest.mark.parametrize(
    "shape", [(3,), (3, 7), (2, 2, 9), (2, 3, 4, 5), (2, 2, 3, 4, 5)], ids=lambda s: f"rank{len(s)}"
)
def test_samples_of_any_rank(solver: str, shape: tuple[int, ...]) -> None:
    """Scalars, vectors, audio, images and video are the same numbers in another shape."""
    sampler = Sampler(affine, LINEAR, solver=solver, steps=4)
    x, seeds = normal(*shape), range(shape[0])
    result = sampler(x, seeds=seeds)
    assert result.shape == x.shape
    assert torch.equal(result.reshape(len(x), -1), sampler(x.reshape(len(x), -1), seeds=seeds))


@pytest.mark.parametrize("solver", ["ddim", "f_pndm", "unipc"])
def test_channels_last_is_kept_to_the_result(solver: str) -> None:
    """The layout is kept through the network and to the result; the numbers do not change."""
    for x, layout in (
        (normal(2, 3, 4, 5), torch.channels_last),
        (normal(2, 3, 2, 4, 5), torch.channels_last_3d),
    ):
        strides = []

        def spy(x: Tensor, t: Tensor, strides: list[Any] = strides) -> Tensor:
            strides.append(x.stride())
            return affine(x, t)

        sampler = Sampler(spy, LINEAR, solver=solver, steps=3)
        plain, last = sampler(x), sampler(x.contiguous(memory_format=layout))
        assert torch.equal(plain, last)
        assert plain.is_contiguous() and last.is_contiguous(memory_format=layout)
        assert set(strides) == {plain.stride(), last.stride()}
        assert sampler.describe()["routed"] == {}


def test_noise_and_outputs_of_any_strides() -> None:
    x = normal(4, 5, 3)
    sampler = Sampler(lambda x, t: affine(x, t).mT.contiguous().mT, LINEAR, steps=3)
    assert torch.equal(sampler(x.mT.contiguous().mT), Sampler(affine, LINEAR, steps=3)(x))
    assert sampler.describe()["routed"] == {
        "network output copied into the state's memory layout": 3
    }
    sliced = normal(4, 5, 6)[..., ::2]
    assert torch.equal(
        Sampler(affine, LINEAR, steps=3)(sliced),
        Sampler(affine, LINEAR, steps=3)(sliced.contiguous()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_see_the_state_cast(dtype: torch.dtype) -> None:
    """The state stays float32; what the network sees is the state, cast."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.3, dtype=dtype))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == dtype and t.dtype == torch.float32
            self.seen.append(x.clone())
            return self.scale * x

    module, states = Half(), []
    sampler = Sampler(module, LINEAR, solver="ipndm", steps=5)
    x = normal(2, 3, 4)
    result = sampler(x, callback=lambda p: states.append(p.state.clone()))
    assert result.dtype == torch.float32
    assert torch.equal(module.seen[0], x.to(dtype))
    for seen, state in zip(module.seen[1:], states, strict=False):
        assert torch.equal(seen, state.to(dtype))
    exact = Sampler(lambda x, t: module.scale.float() * x, LINEAR, solver="ipndm", steps=5)(x)
    eps = torch.finfo(dtype).eps
    assert (result - exact).abs().max() < 50 * eps * exact.abs().max()
    # A plain function is fed what the noise is.
    dtypes = []
    plain = Sampler(lambda x, t: dtypes.append(x.dtype) or x, LINEAR, steps=2)
    assert plain(x.to(dtype)).dtype == torch.float32 and set(dtypes) == {dtype}


def test_float64_runs_are_float64_throughout() -> None:
    dtypes = set()

    def spy(x: Tensor, t: Tensor) -> Tensor:
        dtypes.update((x.dtype, t.dtype))
        return gaussian(x, t)

    x = normal(2, 3, dtype=torch.float64)
    wide = Sampler(spy, LINEAR, solver="f_pndm", steps=8, dtype=torch.float64)(x)
    assert dtypes == {torch.float64} and wide.dtype == torch.float64
    narrow = Sampler(gaussian, LINEAR, solver="f_pndm", steps=8)(x)
    assert narrow.dtype == torch.float32
    assert 1e-9 < (wide - narrow).abs().max() < 2e-5


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0,)])
@pytest.mark.parametrize("settings_", [{}, {"guidance_scale": 2.0}])
def test_empty_batches_come_back_empty(shape: tuple[int, ...], settings_: dict[str, Any]) -> None:
    sampler = Sampler(affine, LINEAR, solver="ddim", steps=3, eta=1.0)
    assert sampler(torch.empty(shape), **settings_).shape == shape
    assert sampler(seeds=[], shape=shape[1:]).shape == (0, *shape[1:])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_layout_and_dtype_samples_the_same(data: st.DataObject) -> None:
    """Against the run of each image alone in float64."""
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    solver = data.draw(st.sampled_from(solver_names()))
    steps = data.draw(st.integers(1, 5))
    x = normal(*shape).to(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    strided = x.permute(order).contiguous().permute(tuple(np.argsort(order)))
    assert torch.equal(strided, x)
    f = lambda x, t: (0.3 * x.double()).to(x.dtype)
    seeds = range(len(x))
    result = Sampler(f, LINEAR, solver=solver, steps=steps)(strided, seeds=seeds)
    assert result.shape == x.shape and result.dtype == torch.float32
    exact = Sampler(f, LINEAR, solver=solver, steps=steps, dtype=torch.float64)
    expected = exact(x.double(), seeds=seeds)
    size = max(1.0, float(expected.abs().max())) if x.numel() else 1.0
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=rounding * 10 * size)
