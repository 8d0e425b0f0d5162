"""What the fused step refuses."""

import pytest
import torch

from fastdiff.ops import allocate_slots, multistep_step
from tests.helpers.multistep import problem


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"reads": 3}, ValueError, r"reads must be one of \(1, 2, 4, 8, 16\), got 3"),
        ({"writes": 4}, ValueError, r"writes must be one of \(1, 2, 3\), got 4"),
        ({"slots": [1.0]}, TypeError, "slots must be a tensor, got list"),
        ({"slots": torch.zeros(4, 3, 5).half()}, TypeError, "slots must be torch.float32 or"),
        ({"slots": torch.zeros(4)}, ValueError, r"slots must have the shape \[S, B, \.\.\.\]"),
        (
            {"slots": torch.zeros(4, 3, 5, 7, 3).transpose(2, 3)},
            ValueError,
            "slots must be contiguous or channels_last",
        ),
        ({"slots": torch.zeros(1, 3, 3, 5, 7).expand(4, -1, -1, -1, -1)}, ValueError, "overlap"),
        ({"slots": torch.zeros(4, 6, 3, 5, 7)[:, ::2]}, ValueError, "slots must be dense"),
        ({"output": torch.zeros(3, 3, 5, 8)}, ValueError, r"output must have the shape \(3, 3"),
        ({"output": torch.zeros(6, 3, 5, 7)}, ValueError, r"output must have the shape \(3, 3"),
        ({"output": torch.zeros(3, 3, 5, 7).int()}, TypeError, "output must be torch.float64 or"),
        (
            {"output": torch.zeros(3, 5, 7, 3).permute(0, 3, 1, 2)},
            ValueError,
            "output must be contiguous within each sample",
        ),
        ({"coefficients": torch.zeros(1, 14)}, ValueError, r"coefficients must .* got \(1, 14\)"),
        ({"coefficients": torch.zeros(1, 15).double()}, TypeError, "coefficients must be"),
        ({"index": torch.zeros(6)}, TypeError, "index must be torch.int32"),
        ({"index": torch.zeros(5).int()}, ValueError, r"index must have the shape \(6,\)"),
        ({"guidance": torch.zeros(2)}, ValueError, r"guidance must have the shape|output must"),
        ({"guidance": torch.zeros(1), "output": None}, ValueError, "guidance needs output"),
        ({"seeds": torch.zeros(3)}, TypeError, "seeds must be torch.int64"),
        ({"seeds": torch.zeros(2).long()}, ValueError, r"seeds must have the shape \(3,\)"),
        (
            {"seeds": torch.zeros(3).long(), "noise": torch.zeros(3, 3, 5, 7)},
            ValueError,
            "at most one of seeds and noise",
        ),
        ({"noise": torch.zeros(3, 3, 5, 7).half()}, TypeError, "noise must be torch.float32"),
        ({"network_input": torch.zeros(4, 3, 5, 7)}, ValueError, r"network_input must .* or \(6"),
        (
            {"network_input": torch.zeros(1, 3, 5, 7).expand(3, -1, -1, -1)},
            ValueError,
            "network_input must not overlap",
        ),
        ({"seeds": torch.zeros(6).long()[::2]}, ValueError, "seeds must be contiguous"),
        ({"output": torch.zeros(3, 3, 5, 7, device="meta")}, ValueError, "output must be on the"),
        (
            {"output": torch.zeros(3, 3, 5, 7, requires_grad=True)},
            ValueError,
            "not differentiable",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = problem() | change
    with pytest.raises(error, match=match):
        multistep_step(**arguments)


@pytest.mark.parametrize("slot", [-1, 4, 2**30])
def test_unknown_slots_are_refused_on_the_cpu(slot):
    arguments = problem()
    arguments["index"][3] = slot
    with pytest.raises((RuntimeError, IndexError), match="index"):
        multistep_step(**arguments)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_allocate_slots_refuses_a_bad_count(count):
    with pytest.raises(ValueError, match="count must be a positive integer"):
        allocate_slots(count, torch.zeros(1, 2))
