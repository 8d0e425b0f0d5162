"""A visit to a GPU without one: the schedule's word, the lines, and real units on the CPU."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import measure, registry, timing
from bench.record import together
from bench.registry import Baseline
from bench.visit import child, command, plan, probes, rehearsal
from bench.visit.lines import CUT, Lines, merged, reds
from bench.visit.plan import PLAN, Unit
from tests.helpers.toys import case, entry

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def row(**changes):
    return {
        "entry": "toy", "kind": "op", "commit": "a", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0,
        "over_ours": {"x": 2.0}, "skipped": {"y": "not installed"}, "launches": None,
        "times": {"replayed": {"fastdiff": {}}}, "rounds": {"replayed": 7}, **changes,
    }  # fmt: skip


# == The schedule ==================================================================================


@pytest.fixture(scope="module")
def rehearsed():
    """20 seconds of scripted processes: late, hanging, aborting, red; no diffusers, no extension.

    What is checked of them is in bench/visit/rehearsal.py; here, that it finds what it should.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--rehearse", "20"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done


def test_a_rehearsal_is_green(rehearsed):
    assert rehearsed.returncode == 0, rehearsed.stdout + rehearsed.stderr
    assert rehearsed.stdout.endswith("rehearsal green\n")


def test_a_rehearsal_finds_what_breaks_the_schedules_word():
    plan = [Unit("a", "x", 1), Unit("b", "x", 1), Unit("c", "x", 1, needs=("diffusers",))]
    line = lambda name, left=5.0: {"kind": "begin", "name": name, "left": left, "seconds": 1}
    assert rehearsal._in_order([line("a"), line("b")], plan) == []
    assert "another order" in rehearsal._in_order([line("b"), line("a")], plan)[0]
    assert "0.5 s left of 1.0" in rehearsal._in_order([line("a", 0.5)], plan)[0]
    assert "without diffusers" in rehearsal._in_order([line("c")], plan)[0]
    assert rehearsal._late("a call", 13.1, 10) and not rehearsal._late("a call", 12.9, 10)


def test_the_plan_fits_and_says_what_the_children_can_do():
    assert len({unit.name for unit in PLAN}) == len(PLAN)
    assert {unit.kind for unit in (*PLAN, plan.BUILD)} <= child.KINDS.keys()
    before_the_rest = [u for u in PLAN if not u.name.startswith("the rest of")]
    headline = before_the_rest[: [u.name for u in before_the_rest].index("checks") + 1]
    assert sum(unit.seconds for unit in headline) < plan.BUDGET_S - 100
    parts = [part for unit in PLAN if unit.kind == "probe" for part in unit.parts]
    assert sorted(parts) == sorted(probes.PROBES)


def test_every_unit_of_times_finds_its_cases():
    """By the names that the entries give on a GPU; each word of an expression finds some."""
    from bench.registry import entries

    cuda, known = torch.device("cuda"), {entry.name: entry for entry in entries()}
    for unit in PLAN:
        if unit.kind == "times":
            for name in unit.entries:
                cases = [case.name for case in known[name].cases(cuda, False)]
                chosen = [case for case in cases if re.search(unit.cases, case)]
                assert chosen, (unit.name, name)
        for word in re.findall(r"[0-9]+x[0-9x]+", unit.cases):
            found = [c.name for e in unit.entries for c in known[e].cases(cuda, False)]
            assert any(word in name for name in found), (unit.name, word)


def test_every_case_and_baseline_is_in_some_unit():
    """The last units hold all that those before them leave out."""
    from bench.registry import entries

    last = {e for unit in PLAN if unit.compiled is None and not unit.cases for e in unit.entries}
    assert last == {entry.name for entry in entries()} == set(plan.ENTRIES)


# == Lines and the record ==========================================================================


def test_lines_of_many_processes_and_a_torn_one(tmp_path):
    code = ("import sys\nfrom pathlib import Path\nfrom bench.visit.lines import Lines\n"
            "for k in range(200): Lines(Path(sys.argv[1])).append('test', name=sys.argv[2] + "
            "str(k), ok=True, said='x' * 500)")  # fmt: skip
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT)
               for name in "abcd"]  # fmt: skip
    assert [process.wait() for process in running] == [0] * 4
    with Lines(tmp_path).path.open("a") as file:
        file.write('{"kind": "test", "na')  # the disk was full
    assert len(merged(Lines(tmp_path).read())["tests"]) == 800


def test_a_record_is_shaped_like_those_of_bench(tmp_path):
    lines = Lines(tmp_path)
    lines.append("head", device="NVIDIA H100", dry=False)
    lines.append("failed", name="toy a", said="out of memory")
    lines.append("case", name="toy a", row=row())
    lines.append("launches", name="toy a", count=1)
    lines.append("gates", entry="toy", gates=[{"case": "g", "ok": True}])
    lines.append("unit", name="step", ok=True)
    lines.append("triton", unit="step", compiled=2, cached=5)
    lines.append("triton", unit="gates", compiled=0, cached=1)
    record = lines.record()
    assert record["device"] == "NVIDIA H100" and not record["failed"] and record["complete"]
    assert record["cases"]["toy a"]["launches"] == 1
    assert record["triton"] == {"compiled": 2, "cached": 6}
    lines.append("left", units={"tune": {}})
    assert not lines.record()["complete"] and not any(reds(lines.record()).values())
    lines.append("unit", name="step", ok=False, codes={"all": 1})
    assert reds(lines.record())["units"] == ["step"]


def test_gates_of_several_processes_add_up_and_the_last_word_counts(tmp_path):
    lines, gate = Lines(tmp_path), lambda case, ok: {"case": case, "ok": ok}
    lines.append("gates", entry="toy", gates=[gate("a", False), gate("b", True)])
    assert lines.record()["gates"]["toy"]["red"] == [gate("a", False)]
    lines.append("gates", entry="toy", gates=[gate("c", True), gate("a", True)])
    assert lines.record()["gates"]["toy"] == {"checked": 3, "red": []}


def test_a_case_measured_again_keeps_its_ratios_and_gains_the_missing():
    late = row(commit="b", over_ours={"y": 3.0, "x": 9.0}, skipped={}, p50_us=7.0)
    found = together(row(), late)
    assert found["over_ours"] == {"y": 3.0, "x": 2.0} and found["p50_us"] == 1.0
    assert found["skipped"] == {} and found["commits"] == {"y": "b", "x": "b"}
    assert list(found["times"]) == ["replayed", "replayed, again"]
    assert together(None, late) is late


def test_a_second_call_begins_with_what_failed(tmp_path):
    lines, ended = Lines(tmp_path), {"checks": {"tests": 1, "memcheck": -9}, "haar": {"all": 1}}
    for unit in PLAN[:11]:
        codes = ended.get(unit.name, {})
        lines.append("unit", name=unit.name, ok=not codes, codes=codes, killed=False)
    lines.append("test", name="tests/a.py::b", ok=False)
    lines.append("test", name="tests/capture/test_gpu.py::c", ok=False)
    lines.append("probe", name="haar", ok=False)
    lines.append("gates", entry="spectral_filter", gates=[{"case": "g", "ok": False}])
    lines.append("case", name="toy a", row=row(p80_us=1.2))
    units = command.chosen(None, lines.record())
    assert [u.name for u in units[:6]] == [
        "doctor", "red tests again", "red captures again", "red probes again", "red entries again",
        "noisy cases again",
    ]  # fmt: skip
    assert [unit.blocking for unit in units[1:6]] == [True, False, True, True, False]
    assert units[1].names == ("tests/a.py::b",) and units[5].names == ("toy a",)
    assert units[4].entries == ("haar", "spectral_filter")
    haar, checks, first = units[6:9]
    assert haar.name == "haar" and checks.parts == ("memcheck",)  # the tests ended by themselves
    assert first.name == PLAN[11].name
    chosen = command.chosen(["tune"], lines.record())
    assert [unit.name for unit in chosen] == ["doctor", "tune"]


# == The command ===================================================================================


@NO_GPU
def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "--dry" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--budget", "0"], ["--only", "nothing"], ["--rehearse", "-1"]])
def test_what_cannot_be_done_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        command.main(given)
    assert "must be" in capsys.readouterr().err


def test_the_schedule_needs_no_torch():
    code = "import sys, bench.__main__, bench.visit.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_dry_visit_does_real_units(tmp_path):
    """A sweep on the CPU; a second call has no time for anything and loses nothing."""
    run = lambda budget: subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--dry", "--budget", budget, "--out", tmp_path,
         "--only", "tune"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    done = run("300")
    record = json.loads((tmp_path / "record.json").read_text())
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    assert record["dry"] and record["device"] == "cpu" and not record["left"]
    assert record["units"].keys() == {"doctor", "tune"} and record["machine"]["diffusers"]
    assert "no number of a GPU" in done.stdout and len(list(tmp_path.iterdir())) <= 8
    done = run("1")
    assert done.returncode == 0 and "did not fit: doctor, tune" in done.stdout
    assert json.loads((tmp_path / "record.json").read_text())["units"] == record["units"]


def test_tests_are_streamed_one_by_one(tmp_path):
    unit = Unit("tests", "test", 300, names=("tests/kernels/test_spectral_filter.py",))
    process = command.child(unit, "", time.time() + 300, tmp_path, dry=True)
    assert subprocess.run(process, cwd=ROOT, capture_output=True).returncode == 0
    tests = Lines(tmp_path).record()["tests"]
    assert "tests/kernels/test_spectral_filter.py::test_nothing_to_do" in tests
    assert all(test["ok"] for test in tests.values())


def test_a_worker_that_died_leaves_a_line(tmp_path):
    report = SimpleNamespace(when="???", nodeid="tests/a.py::b", outcome="failed", passed=False,
                             failed=True, duration=0.0, longrepr="worker crashed")  # fmt: skip
    child.Streaming(Lines(tmp_path)).pytest_runtest_logreport(report)
    assert reds(Lines(tmp_path).record())["tests"] == ["tests/a.py::b"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A child of the visit in this process, over an entry that takes no time."""
    twice = Baseline(lambda sets: lambda i: sets[i] + sets[i])
    toy = entry(case("a", sum=twice, compiled=dataclasses.replace(twice, compiles=True)), case("b"))
    monkeypatch.setattr(timing, "WARM_S", 0.0)
    monkeypatch.setattr(measure, "budget_s", lambda quick, device: 0.0)
    monkeypatch.setattr(measure, "FOOTPRINT", 2048)
    monkeypatch.setattr(registry, "entries", lambda: (toy,))

    def started(kind, part="", until=1e12, **options):
        unit = Unit(kind, kind, 1, ("toy",), **options)
        started.code = child.main(command.child(unit, part, until, tmp_path, dry=True)[-1])
        return Lines(tmp_path).record()

    return started


def test_times_are_of_the_chosen_cases_and_baselines(start):
    name = f"toy a 64 threads={torch.get_num_threads()}"
    record = start("times", cases="^a ")
    assert list(record["cases"]) == [name] and list(record["cases"][name]["over_ours"]) == ["sum"]
    assert record["gates"]["toy"] == {"checked": 1, "red": []}
    record = start("times", compiled=True)
    assert list(record["cases"]) == [name]  # the other one has none
    assert set(record["cases"][name]["over_ours"]) == {"sum", "compiled"}
    before = len(record["cases"][name]["times"])
    record = start("times", compiled=None)
    assert len(record["cases"]) == 2 and len(record["cases"][name]["times"]) == before


def test_nothing_begins_after_its_time(start):
    record = start("times", until=0)
    assert not record["cases"] and not record["gates"]
    assert start.code == CUT  # so that the next call goes on with it


def test_what_was_cut_is_gone_on_with_and_is_no_failure(tmp_path):
    lines = Lines(tmp_path)
    lines.append("unit", name="step", ok=False, codes={"all": CUT}, killed=False)
    lines.append("unit", name="checks", ok=False, codes={"haar": CUT, "tests": 1}, killed=False)
    record = lines.record()
    assert reds(record)["units"] == ["checks"] and not record["complete"]
    left = {unit.name: unit for unit in plan.missing(record)}
    assert "step" in left and left["checks"].parts == ("haar",)
    assert not plan.follow_up(record, reds(record))


def test_a_probe_says_what_it_found(start):
    probe = start("probe", "transforms")["probes"]["transforms"]
    assert probe["ok"] and probe["said"]["worst_error"] < 1e-14
    assert start("probe", "generator")["probes"]["generator"]["said"] == "for a GPU only"
