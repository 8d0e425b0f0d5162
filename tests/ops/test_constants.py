"""Numbers that C++ and the Triton kernels repeat, against constants.py and row.py."""

import inspect
import itertools
import re
from pathlib import Path

import pytest

from fastdiff.ops import constants, row
from fastdiff.ops.spectral_filter import PRECISIONS

CSRC = Path(__file__).parents[2] / "csrc"


def cpp_numbers() -> dict[str, int]:
    """All `constexpr <integer type> kName = <number>, ...;` of csrc's headers, by name."""
    found: dict[str, int] = {}
    for header in sorted(CSRC.glob("*.h")):
        for line in re.findall(r"^constexpr \w+ (k.*?);", header.read_text(), re.MULTILINE):
            for name, value in re.findall(r"(k\w+) = (\d+)\b(?! *<<)", line):
                assert name not in found, f"{name} is there twice"
                found[name] = int(value)
    return found


def test_csrc_repeats_them():
    found = cpp_numbers()
    wanted = {
        "kMaxReads": max(constants.READS),
        "kMaxWrites": max(constants.WRITES),
        "kMaxOperands": constants.MAX_OPERANDS,
        "kMaxSums": constants.MAX_SUMS,
        "kMaxLevels": constants.MAX_LEVELS,
        "kPyramidNoise": constants.PYRAMID_NOISE,
        "kExpansionNoise": constants.EXPANSION_NOISE,
        "kSpectralNoise": constants.SPECTRAL_NOISE,
        "kRowHead": row.HEAD,
        "kRowEach": row.EACH,
        "kIndexHead": row.INDEX_HEAD,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    unknown = [name for name in found if re.search("Max|Row|Index|Noise", name)]
    assert set(unknown) <= set(wanted), "a shared number that constants.py does not have"


def test_csrc_numbers_the_steps():
    source = (CSRC / "half_spectrum_ops.cpp").read_text()
    (names,) = re.findall(r"enum Step : int64_t \{(.*?)\}", source)
    assert tuple(name.strip()[1:].lower() for name in names.split(",")) == constants.STEPS


def test_csrc_reads_a_row_in_its_order():
    source = (CSRC / "cpu" / "multistep_step_kernel.h").read_text()
    (head,) = re.findall(r"const S (p = row\[0\].*?);", source)
    assert re.findall(r"row\[(\d)\]", head) == [str(i) for i in range(row.HEAD)]
    places = row.Weights(*range(row.EACH), slots=[])
    for name, operand in (("sample", "x0"), ("output", "model"), ("noise", "noise")):
        assert f"sum.add(weight[{getattr(places, name)}], {operand});" in source
    assert (row.STAGE, row.PURPOSE) == (0, 1)
    assert "normals(step.seeds[sample], step.index[0], step.index[1]," in source


def test_purposes_differ():
    purposes = [value for name, value in vars(constants).items() if name.endswith("_NOISE")]
    assert sorted(purposes) == list(range(5))


# == The Triton kernels, which may import nothing of fastdiff.ops ==================================


@pytest.fixture
def source():
    pytest.importorskip("triton")

    def of(kernel):
        return inspect.getsource(kernel.fn)

    return of


def test_the_fused_steps_kernel_repeats_the_row(source):
    from fastdiff.kernels.multistep_step import _multistep_step_kernel

    text = source(_multistep_step_kernel)
    head = row.Head(*range(row.HEAD))
    assert f"weights = row + {row.HEAD}\n" in text
    assert f"WEIGHTS: tl.constexpr = {row.EACH} + READS\n" in text
    assert (head.p, head.q, head.low, head.high) == (0, 1, 2, 3)
    assert "p, q = tl.load(row), tl.load(row + 1)\n" in text
    assert "low, high = tl.load(row + 2), tl.load(row + 3)\n" in text
    assert f"scaled = tl.load(row + {head.input_scale}) * total\n" in text
    assert row.Weights._fields == ("sample", "output", "noise", "slots")
    for name, at in (("x0", ""), ("output", " + 1"), ("noise", " + 2")):
        assert f"use_{name} |= tl.load(weights + w * WEIGHTS{at}) != 0\n" in text
    assert text.count(f"tl.load(weights + w * WEIGHTS + {row.EACH} + r)") == 2
    assert f"tl.load(index + {row.INDEX_HEAD} + r)" in text
    assert f"tl.load(index + {row.INDEX_HEAD} + READS + w)" in text
    assert (row.STAGE, row.PURPOSE) == (0, 1)
    assert "stage, purpose = tl.load(index), tl.load(index + 1)\n" in text


def test_every_variant_is_compiled_ahead_of_time(source):
    from fastdiff.kernels import multistep_step, weighted_sums

    found = {}
    for name, _, arguments, _ in multistep_step.aot_variants():
        reads, writes = arguments["READS"], arguments["WRITES"]
        assert arguments["coefficients"].shape[1] == row.width(reads, writes)
        assert len(arguments["index"]) == row.INDEX_HEAD + reads + writes
        found[reads, writes] = name
    assert set(found) == set(itertools.product(constants.READS, constants.WRITES))
    variants = [arguments for _, _, arguments, _ in weighted_sums.aot_variants()]
    assert max(len(v["operands"]) for v in variants) == constants.MAX_OPERANDS
    assert max(len(v["results"]) for v in variants) == constants.MAX_SUMS


def test_the_spectral_kernels_repeat_them(source):
    from fastdiff.kernels import half_spectrum, spectral_filter, spectral_update

    assert f"NOISE: tl.constexpr = {constants.SPECTRAL_NOISE} " in source(half_spectrum._words)
    assert constants.LARGEST_WHOLE == spectral_filter.LARGEST
    assert set(spectral_filter.PRECISIONS) == set(PRECISIONS)
    given, sample, batch = constants.STEPS
    adaptive = f'if STEP == "{sample}" or STEP == "{batch}":'
    assert adaptive in source(half_spectrum._combine_kernel)
    assert adaptive in source(spectral_update._whole_kernel)
    assert f'if STEP == "{sample}":' in source(half_spectrum.adaptive_row)
    assert f'if step != "{given}":' in inspect.getsource(half_spectrum.launch_combine)
    assert f'if step != "{given}":' in inspect.getsource(spectral_update.launch_whole)


# == row.py itself =================================================================================


@pytest.mark.parametrize("reads", constants.READS)
@pytest.mark.parametrize("writes", constants.WRITES)
def test_columns_come_back_as_they_were_put(reads, writes):
    import numpy as np

    values = iter(range(1000))
    head = row.Head(*(next(values) for _ in range(row.HEAD)))
    weights = [
        row.Weights(*(next(values) for _ in range(row.EACH)), [next(values) for _ in range(reads)])
        for _ in range(writes)
    ]
    columns = row.columns(head, weights)
    assert columns == list(range(row.width(reads, writes)))
    rows = np.array([columns, columns])
    assert [column.tolist() for column in row.head(rows)] == [[c, c] for c in head]
    for found, put in zip(row.weights(rows, reads), weights, strict=True):
        assert [column[0] for column in (found.sample, found.output, found.noise)] == [*put[:3]]
        assert [column[1] for column in found.slots] == put.slots
    assert row.variant(reads) == reads
    assert (
        row.index(7, 1, [2] * reads, [3] * writes)[row.INDEX_HEAD :] == [2] * reads + [3] * writes
    )


def test_the_variant_of_other_numbers_of_reads():
    assert [row.variant(n) for n in (3, 5, 9, 16)] == [4, 8, 16, 16]
