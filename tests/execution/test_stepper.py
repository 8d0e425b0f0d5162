"""The slots of a run without a network: rows that something else than the host fills."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from fastdiff import build_tableau
from fastdiff.execution.stepper import Stepper
from fastdiff.execution.table import Table
from fastdiff.ops import row
from tests.helpers.oracles import run_rows
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal


def test_rows_may_be_replaced_while_a_run_is_under_way() -> None:
    """The weight of F, sample by sample, from what the network returned."""
    tableau = build_tableau("ddim", LINEAR, spacing=[900, 500, -1])
    x = normal(2, 3, 4, dtype=torch.float64)
    table = Table(tableau, torch.float64, torch.device("cpu"))
    stepper = Stepper(table, x, Counter())
    stepper.rows = list(stepper.rows)
    for number, stage in enumerate(tableau.stages):
        output = None if stage.time is None else 0.5 * stepper.views[stage.sees]
        if number == 2:
            found = stepper.rows[2].expand(2, -1).clone()
            (weights,) = row.weights(found, tableau.read_width(2))
            weights.output.copy_(-output.abs().amax(dim=(1, 2)))
            stepper.rows[2] = found
        stepper.launch(number, output)
    short = build_tableau("ddim", LINEAR, spacing=[900, 500])
    middle = run_rows(short, lambda x, t: 0.5 * x, x.numpy())
    output = 0.5 * middle
    expected = (
        tableau.stages[2].writes[0].slots[0] * middle
        - np.abs(output).max(axis=(1, 2), keepdims=True) * output
    )
    np.testing.assert_allclose(stepper.views[tableau.result].numpy(), expected, rtol=1e-14)
    whole = Stepper(table, x, Counter())  # the table itself is as it was
    assert torch.equal(whole.rows[2], torch.from_numpy(tableau.row(2)))


def test_a_batch_that_does_not_fit_is_refused() -> None:
    tableau = build_tableau("ddim", LINEAR, 4, eta=np.array([0.0, 1.0]))
    table = Table(tableau, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="noise must have the 2 samples the tableau has rows for"):
        Stepper(table, normal(3, 4, dtype=torch.float64), Counter())
