"""The pages say what the results say."""

import json
import re

import pytest
import torch

from bench import files, record, report
from bench.registry import entries
from bench.report import gpu, kernels
from bench.visit.lines import merged
from bench.words import size, times


@pytest.fixture(scope="module")
def results():
    return report.load()


def test_pages_agree_with_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_result_is_noticed(results, tmp_path, monkeypatch, capsys):
    """The same pages beside other numbers are out of date."""
    for page in report.pages(*results):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((files.ROOT / page).read_text())
    assert report.main(["--check"], root=tmp_path) == 0
    records, solvers, code = results
    changed = json.loads(json.dumps(records))
    for data in changed.values():
        for case in data["cases"].values():
            case["p50_us"] *= 1.5
    monkeypatch.setattr(report, "load", lambda: (changed, solvers, code))
    assert report.main(["--check"], root=tmp_path) == 1
    assert "README.md" in capsys.readouterr().out


def test_pictures_are_drawn(results, tmp_path):
    from bench.report.figures import draw

    records, solvers, _ = results
    drawn = list(draw(records, solvers, tmp_path))
    assert all(path.stat().st_size > 10_000 for path in drawn)
    page = (files.ROOT / "docs" / "benchmarks.md").read_text()
    shown = set(re.findall(r"\]\(([\w.-]+\.png)\)", page))
    assert shown == {path.name for path in drawn}


def test_the_committed_record_is_whole_and_green(results):
    records, _, _ = results
    assert "cpu" in {data["device"] for data in records.values()}
    for name, data in records.items():
        assert data["device"] != "cpu" or data["complete"], name  # a visit to a GPU may be cut
        assert not data["quick"], name
        assert "changes" not in data["commit"], name
        assert not any("changes" in part["commit"] for part in data["parts"].values()), name
        if data["device"] == "cpu":  # of a visit what is red is published too
            assert not any(found["red"] for found in data["gates"].values()), name


def test_what_a_visit_found_stands_beside_what_was_predicted(results):
    """A record made of a visit's lines goes through every page; the rest is not measured yet."""
    records, solvers, code = results
    cpu = next(iter(records.values()))
    case = next(n for n in cpu["cases"] if n.startswith("multistep_step plms 4x4x64x64"))
    row = cpu["cases"][case] | {"p50_us": 3.21, "launches": None}
    finds = ("gates", "cases", "skipped", "failed", "parts", "complete")
    head = {key: value for key, value in cpu.items() if key not in finds}
    found = merged([
        {"kind": "head", "at": 0, **head, "device": "NVIDIA H100", "threads": [1], "quick": False,
         "command": "python -m bench gpu", "cpu": "x", "cuda": "13.0", "driver": "1"},
        {"kind": "case", "at": 1, "name": case.partition(" threads")[0], "row": row},
    ])  # fmt: skip
    made = report.pages(
        records | {"nvidia-h100-2026-11-28.json": found | {"parts": {}}}, solvers, code
    )
    lines = made["docs/gpu-visit.md"]["predicted"].splitlines()
    (measured,) = [line for line in lines if "3.21 us" in line]
    assert (
        measured.startswith("| `multistep_step plms 4x4x64x64`") and "measured NVIDIA" in lines[0]
    )
    assert sum(kernels.NOT_YET in line for line in lines) == len(lines) - 3
    assert "3.21 us" in made["docs/kernels.md"]["times multistep_step"]


def test_occupancy_by_the_first_resource_that_ends():
    assert gpu.occupancy(32, 256, 0) == (64, "registers")  # both end together
    assert gpu.occupancy(56, 256, 0) == (32, "registers")
    assert gpu.occupancy(20, 128, 100 << 10) == (8, "shared memory")
    assert gpu.occupancy(16, 32, 0) == (32, "blocks")


# What the README and the docs say we are faster than, or compare with.
COMPARED = (
    ("multistep_step", "plms", "diffusers PNDM"),
    ("multistep_step", "unipc", "diffusers UniPC"),
    ("multistep_step", "plms", "torch.compile"),
    ("haar", "split", "torch.compile"),
    ("haar", "merge", "pytorch_wavelets"),
    ("spectral_update", "langevin", "published operations"),
    ("solver_loop", "ipndm", "diffusers PNDM"),
    ("scheduler_step", "PNDM", "stock"),
    ("sampler_functions", "ipndm", "published operations"),
    ("pipeline", "ddim", "diffusers DDIMPipeline"),
)


@pytest.mark.parametrize("entry, row, baseline", COMPARED)
def test_every_comparison_is_measured_and_has_its_number(results, entry, row, baseline):
    (found,) = (e for e in entries() if e.name == entry)
    cases = [case for case in found.cases(torch.device("cpu"), False) if case.row == row]
    assert cases and all(baseline in case.baselines for case in cases)
    measured = [case for data in results[0].values() for case in data["cases"].values()]
    assert any(
        baseline in case["over_ours"]
        for case in measured
        if (case["entry"], case["row"]) == (entry, row)
    )


def test_a_page_without_its_marks_is_named():
    with pytest.raises(SystemExit, match=r"page\.md must hold.*bench:begin x"):
        report.filled("page.md", "no marks", {"x": "text"})


@pytest.mark.parametrize(
    "value, words", [(0, "0 B"), (3, "3.00 B"), (999.6, "1.00 kB"), (12.6e6, "12.6 MB")]
)
def test_sizes(value, words):
    assert size(value) == words


def test_losses_are_bold():
    assert times(0.876) == "**0.88x**" and times(12.34) == "12.3x"


def test_an_entry_measured_apart_takes_the_place_of_the_older_one(tmp_path, monkeypatch):
    """Newer parts only, of the same machine, and the pages name them."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    head = {"schema": record.SCHEMA, "device": "cpu", "cpu": "x", "torch": "2", "threads": [1],
            "quick": False, "complete": True, "commit": "a", "date": "2026-05-02"}  # fmt: skip
    case = lambda entry, us: {f"{entry} case": {"entry": entry, "p50_us": us}}
    whole = tmp_path / "cpu-2026-05-02.json"
    whole.write_text(
        json.dumps({**head, "gates": {"a": {}, "b": {}}, "cases": case("a", 1) | case("b", 2)})
    )
    part = {
        **head,
        "entries": ["b"],
        "gates": {"b": {"checked": 1, "red": []}},
        "cases": case("b", 3),
    }
    (tmp_path / "cpu-2026-05-03-b.json").write_text(json.dumps({**part, "commit": "c"}))
    (tmp_path / "cpu-2026-05-01-a.json").write_text(json.dumps({**part, "entries": ["a"]}))
    assert record.latest("cpu") == whole
    found = record.completed(whole)
    assert {n: c["p50_us"] for n, c in found["cases"].items()} == {"a case": 1, "b case": 3}
    assert list(found["parts"]) == ["b"] and found["parts"]["b"]["commit"] == "c"
    (tmp_path / "cpu-2026-05-03-b.json").write_text(json.dumps({**part, "cpu": "y"}))
    with pytest.raises(SystemExit, match="does not go with"):
        record.completed(whole)
