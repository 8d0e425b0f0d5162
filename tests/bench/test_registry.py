"""The registry: nothing public goes unmeasured, and bytes are those of the launch."""

import itertools

import pytest
import torch

import fastdiff
from bench import registry
from bench.entries import multistep_step, weighted_sums

CPU = torch.device("cpu")
# Buffers and tables, views; and definitions.
NOT_OPS = {"HaarPyramid", "SpectralGains", "SpectralResponse", "allocate_slots", "haar_orders"}
NOT_OPS |= {name for name in fastdiff.ops.__all__ if name.endswith("_ref")}


def test_every_op_has_an_entry():
    covered = {name for entry in registry.entries() for name in entry.covers}
    assert covered == set(fastdiff.ops.__all__) - NOT_OPS


def test_names_of_cases_are_their_own():
    for entry in registry.entries():
        for device, quick in itertools.product((CPU, torch.device("cuda")), (False, True)):
            names = [case.name for case in entry.cases(device, quick)]
            assert len(names) == len(set(names))
            assert names or (entry.name == "captured_loop" and (device, quick) == (CPU, False))


@pytest.mark.parametrize("row, passes", [("copy", 2), ("ddim", 3), ("plms", 7), ("unipc", 8)])
def test_bytes_are_those_of_every_operand_once(row, passes):
    shape = (2, 3, 8, 8)
    assert multistep_step.moved_bytes(multistep_step.ROWS[row], shape) == passes * 4 * 384


def test_bytes_under_guidance_and_in_sixteen_bits():
    row = multistep_step.ROWS["plms guided bf16"]
    assert multistep_step.moved_bytes(row, (2, 3, 8, 8)) == (6 * 4 + (2 + 2) * 2) * 384


@pytest.mark.parametrize("row, passes", [("plms", 6), ("ddim clipped", 3)])
def test_bytes_of_weighted_sums(row, passes):
    shape = (2, 3, 8, 8)
    assert weighted_sums.moved_bytes(weighted_sums.ROWS[row], shape) == passes * 4 * 384


def test_a_missing_package_is_named_with_the_way_to_get_it():
    word = registry.absent("a_module_nobody_has")
    assert "a_module_nobody_has is not installed" in word and ".[bench]" in word
    baseline = registry.Baseline(lambda sets: None, "a_module_nobody_has", devices=("cuda",))
    assert baseline.lacks(CPU, False) == "for cuda only"
    assert baseline.lacks(torch.device("cuda"), False) == word
    assert not registry.absent("torch") and not registry.absent("")
