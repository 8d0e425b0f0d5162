"""What the Haar operators refuse."""

import pytest
import torch

from fastdiff.ops import haar_expand, haar_loss, haar_merge, haar_noise, haar_split, haar_step
from fastdiff.ops.haar import haar_split_ref

NOT_A_SIZE = r"size must be \(8, 8\).*or one less in a side, got "
X, SEED = torch.zeros(1, 3, 8, 8), torch.tensor([1])
PYRAMID = haar_split_ref(X, 2)
FINE, COARSE = PYRAMID.details, PYRAMID.coarse
ONES2, ONES3 = torch.ones(1, 2, 2), torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: haar_split(X, 4), ValueError, r"levels must be at most 3.*\(8, 8\).*got 4"),
        (lambda: haar_split(X, 6), ValueError, "levels must be 0 to 5, got 6"),
        (lambda: haar_split(X, -1), ValueError, "levels must be 0 to 5, got -1"),
        (lambda: haar_split(X[0], 1), ValueError, r"x must be \[B, C, H, W\], got shape"),
        (lambda: haar_split(X.int(), 1), TypeError, "x must be torch.float64.*got torch.int32"),
        (lambda: haar_split(X.cfloat(), 1), TypeError, "x must be .*got torch.complex64"),
        (lambda: haar_split([1.0], 1), TypeError, "x must be a tensor, got list"),
        (lambda: haar_split(X[:, :, :1], 1), ValueError, "levels must be at most 0"),
        (lambda: haar_merge(PYRAMID, (9, 8)), ValueError, NOT_A_SIZE + r"\(9, 8\)"),
        (lambda: haar_merge(PYRAMID, (6, 8)), ValueError, NOT_A_SIZE + r"\(6, 8\)"),
        (lambda: haar_merge((FINE[:1], COARSE)), ValueError, r"details\[0\] must have"),
        (lambda: haar_merge((FINE[::-1], COARSE)), ValueError, r"details\[1\] must have"),
        (lambda: haar_merge(([d.double() for d in FINE], COARSE)), TypeError,
         r"details\[1\] must be torch.float32, got torch.float64"),
        (lambda: haar_step(X, X[:, :2], ONES3), ValueError, "score must have the shape"),
        (lambda: haar_step(X, X, ONES2), ValueError, r"levels \+ 1, 3\), got"),
        (lambda: haar_step(X, None, ONES3), ValueError, r"levels \+ 1, 2\), got"),
        (lambda: haar_step(X, None, torch.ones(2, 2, 2)), ValueError, r"\(1 or 1, levels \+ 1, 2"),
        (lambda: haar_step(X, None, torch.ones(1, 6, 2)), ValueError, "levels must be at most 3"),
        (lambda: haar_step(X, X, ONES3.double()), TypeError, "coefficients must be torch.float32"),
        (lambda: haar_noise(X, ONES2, None), TypeError, "seeds must be a tensor"),
        (lambda: haar_noise(X, ONES2, SEED.int()), TypeError, "seeds must be torch.int64"),
        (lambda: haar_noise(X, ONES2, torch.arange(2)), ValueError, "seeds must have the shape"),
        (lambda: haar_noise(X, ONES2, SEED, torch.ones(1)), TypeError, "stage must be"),
        (lambda: haar_noise(X, ONES2, SEED, -1), ValueError, "stage must be 0 to"),
        (lambda: haar_noise(X, ONES2, SEED, 1.5), TypeError, "stage must be a tensor, got float"),
        (lambda: haar_expand(X, torch.ones(1, 3, 2), SEED), ValueError, r"\(1 or 1, 2, 2\)"),
        (lambda: haar_expand(X, ONES2, SEED, 0, (14, 16)), ValueError, "size must be"),
        (lambda: haar_step(X.clone().requires_grad_(), None, ONES2), ValueError,
         "haar_step is not differentiable"),
        (lambda: haar_loss(X, ONES2.clone().requires_grad_(), SEED), ValueError,
         "not differentiable in its coefficients"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
