"""The harness: gates before times, resuming, and what a ratio is."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from bench import measure, timing
from bench.entries import multistep_step
from bench.gates import gate_of
from bench.record import Record
from bench.registry import Baseline
from tests.helpers.toys import case, doubling, entry

CPU = torch.device("cpu")


def run(tmp_path, *entries, commit="abc", said=None, **options):
    record = Record(tmp_path / "run.json", {"commit": commit, "device": "cpu"})
    lines = [] if said is None else said
    green = measure.run_entries(
        entries, record, CPU, quick=True, threads=[1], say=lines.append, **options
    )
    return green, json.loads((tmp_path / "run.json").read_text()), record


def out_of_memory(sets):
    """Ours where all buffers are there: its gate, on one of them, is green."""
    if len(sets) > 1:
        raise RuntimeError("out of memory")
    return doubling(sets)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(timing, "WARM_S", 0.0)
    monkeypatch.setattr(measure, "budget_s", lambda quick, device: 0.0)
    monkeypatch.setattr(measure, "FOOTPRINT", 2048)


def test_a_case_gets_times_ratios_and_facts(tmp_path):
    twice = Baseline(lambda sets: lambda i: sets[i] + sets[i])
    green, data, _ = run(tmp_path, entry(case("a", sum=twice)))
    row = data["cases"]["toy a 64 threads=1"]
    assert green and data["complete"]
    assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert set(row["over_ours"]) == {"sum"} and set(row["first_call_ms"]) == {"fastdiff", "sum"}
    assert row["launches"] == 1 and 256 <= row["peak_bytes"]["fastdiff"] < 300
    assert row["gbytes_per_s"] == pytest.approx(512 / row["p50_us"] / 1e3)
    assert set(row["times"]["call to return"]) == {"fastdiff", "sum", "copy"}


def test_a_red_gate_prints_no_number(tmp_path):
    """Of its entry; the next entry has its own."""
    said = []
    other = dataclasses.replace(entry(case("a")), name="other")
    green, data, _ = run(tmp_path, entry(case("a"), case("b", ok=False)), other, said=said)
    assert not green and list(data["cases"]) == ["other a 64 threads=1"]
    assert data["gates"]["toy"]["checked"] == 2
    (red,) = data["gates"]["toy"]["red"]
    assert red["case"] == "b 64" and red["error"] > 4e-4 and red["allowed"] == 0
    assert [line for line in said if " us" in line] == said[-1:]


def test_a_case_may_be_checked_at_another_size(tmp_path):
    small = dataclasses.replace(case("a"), shape=(8,))
    large = dataclasses.replace(case("a", ok=False), checked=small)
    green, data, _ = run(tmp_path, entry(large, dataclasses.replace(large, shape=(128,))))
    assert green and len(data["cases"]) == 2 and data["gates"]["toy"]["checked"] == 1


@pytest.mark.parametrize("allowed, ok", [(1e-3, True), (1e-5, False), (0, False)])
def test_a_bound_is_of_the_largest_value(allowed, ok):
    close = dataclasses.replace(case("a", ok=False), allowed=allowed)
    gate = gate_of(close)
    assert gate["ok"] == ok and gate["error"] == pytest.approx(5e-4, rel=0.01)


def test_what_a_call_leaves_in_its_buffers_is_compared():
    def of(value):
        return lambda sets: lambda i: sets[i].clone() + sets[i].fill_(value).mul(0)

    leaving = dict(leaves=lambda buffers: [buffers], definition=of(2.0))
    assert gate_of(dataclasses.replace(case("a"), ours=of(2.0), **leaving))["ok"]
    assert not gate_of(dataclasses.replace(case("a"), ours=of(3.0), **leaving))["ok"]


def test_a_wrong_kernel_turns_its_gates_red(monkeypatch, tmp_path):
    real = multistep_step.multistep_step_unchecked

    def wrong(slots, *rest):
        real(slots, *rest)
        slots[-1] *= 1 + 1e-5

    monkeypatch.setattr(multistep_step, "multistep_step_unchecked", wrong)
    monkeypatch.setattr(multistep_step, "step_sizes", lambda device: [(1, 3, 8, 8)])
    green, data, _ = run(tmp_path, multistep_step.ENTRY)
    assert not green and not data["cases"]
    assert len(data["gates"]["multistep_step"]["red"]) == len(multistep_step.ROWS)


def test_a_baseline_that_computes_something_else_is_refused(tmp_path):
    """Its case has no times, the next one has."""
    wrong = Baseline(lambda sets: lambda i: sets[i] * 2.001)
    green, data, _ = run(tmp_path, entry(case("a", thrice=wrong), case("b")))
    assert not green and list(data["cases"]) == ["toy b 64 threads=1"]
    assert "thrice differs from ours" in data["failed"]["toy a 64 threads=1"]


def test_a_baseline_that_fails_takes_nothing_with_it(tmp_path):
    def make(sets):
        raise RuntimeError("no such kernel\nand a long story")

    green, data, _ = run(tmp_path, entry(case("a", rival=Baseline(make))))
    row = data["cases"]["toy a 64 threads=1"]
    assert green and not row["over_ours"]
    assert row["skipped"]["rival"] == "failed, RuntimeError: no such kernel"


def test_a_case_of_ours_that_fails_is_red_and_tried_again(tmp_path, monkeypatch):
    bad = dataclasses.replace(case("a"), ours=out_of_memory)
    green, data, _ = run(tmp_path, entry(bad, case("b")))
    assert not green and data["failed"] == {"toy a 64 threads=1": "RuntimeError: out of memory"}
    assert list(data["cases"]) == ["toy b 64 threads=1"] and not data["complete"]
    green, data, again = run(tmp_path, entry(case("a"), case("b")))
    assert green and again.resumed and not data["failed"] and data["complete"]
    assert len(data["cases"]) == 2


def test_gates_that_fail_are_red(tmp_path):
    def broken(sets):
        raise RuntimeError("does not compile")

    fails = dataclasses.replace(case("b"), definition=broken)
    green, data, _ = run(tmp_path, entry(case("a"), fails))
    assert not green and not data["cases"]
    found = data["gates"]["toy"]
    assert found["checked"] == 2
    (red,) = found["red"]
    assert "does not compile" in red["said"]


def test_a_cut_run_leaves_valid_json_and_is_gone_on_with(tmp_path, monkeypatch):
    measured, real = [], measure.measure

    def dies_at_b(case, *rest, **options):
        measured.append(case.row)
        if case.row == "b" and measured.count("b") == 1:
            raise KeyboardInterrupt
        return real(case, *rest, **options)

    monkeypatch.setattr(measure, "measure", dies_at_b)
    toy = entry(case("a"), case("b"), case("c"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, toy)
    cut = json.loads((tmp_path / "run.json").read_text())
    assert list(cut["cases"]) == ["toy a 64 threads=1"] and "complete" not in cut
    _, data, record = run(tmp_path, toy)
    assert record.resumed and measured == ["a", "b", "b", "c"] and data["complete"]
    assert data["cases"]["toy a 64 threads=1"] == cut["cases"]["toy a 64 threads=1"]


@pytest.mark.parametrize("why", ["another torch", "complete", "not JSON", "none"])
def test_only_an_unfinished_record_of_the_same_machine_is_gone_on_with(tmp_path, why):
    path = tmp_path / "run.json"
    before = {"commit": "abc", "device": "cpu", "gates": {}, "skipped": {}, "cases": {"x": {}}}
    if why == "another torch":
        path.write_text(json.dumps(before | {"torch": "1.0"}))
    elif why == "complete":
        path.write_text(json.dumps(before | {"complete": True}))
    elif why == "not JSON":
        path.write_text("{")
    record = Record(path, {"commit": "abc", "device": "cpu"})
    assert not record.resumed and not record.data["cases"]


def test_a_fix_between_two_runs_throws_no_case_away(tmp_path, monkeypatch):
    """Each case says which commit it is of; of a case only the missing baselines are measured."""
    rival = Baseline(lambda sets: lambda i: sets[i] + sets[i])
    commits = iter(["abc", "def", "def"])
    monkeypatch.setattr(measure, "commit", lambda: next(commits))
    broken = dataclasses.replace(case("b"), ours=out_of_memory)
    _, data, _ = run(tmp_path, entry(case("a"), broken), commit="abc")
    assert not data["complete"] and len(data["cases"]) == 1
    green, data, _ = run(tmp_path, entry(case("a", sum=rival), case("b")), commit="def")
    a, b = (data["cases"][f"toy {name} 64 threads=1"] for name in "ab")
    assert green and data["complete"] and (a["commit"], b["commit"]) == ("abc", "def")
    assert set(a["over_ours"]) == {"sum"} and a["commits"] == {"sum": "def"}


def test_nothing_starts_after_the_deadline(tmp_path, monkeypatch):
    record, said = Record(tmp_path / "run.json", {"device": "cpu"}), []
    options = dict(quick=True, threads=[1], say=said.append)
    toy = entry(case("a"))
    assert measure.run_entries([toy], record, CPU, deadline=0.0, **options)
    assert "out of time in its gates" in said[-1] and not record.data["gates"]
    now = iter([0.0, 0.0, 2.0])  # before and after the gate, and then
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert measure.run_entries([toy], record, CPU, deadline=1.0, **options)
    assert "out of time" in said[-1] and not record.data["cases"] and "complete" not in record.data


def test_a_skipped_baseline_is_recorded_with_its_word(tmp_path):
    absent = Baseline(lambda sets: 1 / 0, "a_module_nobody_has")
    _, data, _ = run(tmp_path, entry(case("a", rival=absent)))
    row = data["cases"]["toy a 64 threads=1"]
    assert "a_module_nobody_has is not installed" in row["skipped"]["rival"]
    assert not row["over_ours"]


def test_a_baseline_that_failed_is_tried_again_and_an_absent_one_is_not(tmp_path):
    made = []

    def fails(sets):
        made.append(1)
        raise RuntimeError("out of memory")

    rivals = dict(rival=Baseline(fails), absent=Baseline(fails, "a_module_nobody_has"))
    for count in (1, 2):
        broken = dataclasses.replace(case("b"), ours=out_of_memory)
        run(tmp_path, entry(case("a", **rivals), broken))  # the record stays open
        assert len(made) == count


def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    run(tmp_path, entry(case("a")))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_ratio_survives_a_machine_that_slows_down():
    ours = [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0]
    assert timing.ratio([2 * t for t in ours], ours) == 2.0


def test_rounds_take_every_call_once_and_rotate_the_buffers():
    seen = {"a": [], "b": []}
    calls = {name: lambda i, name=name: seen[name].append(i) for name in seen}
    seconds = timing.interleaved(calls, 3, 0.0, CPU, least=6)
    assert len(seconds["a"]) == len(seconds["b"]) == 6
    assert seen["a"][-6:] == seen["b"][-6:] == [0, 1, 2, 0, 1, 2]


def test_quantiles_in_microseconds():
    found = timing.quantiles([k * 1e-6 for k in range(11)])
    assert found == pytest.approx({"p20_us": 2.0, "p50_us": 5.0, "p80_us": 8.0})
