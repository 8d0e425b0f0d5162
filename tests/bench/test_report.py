"""The pages say what the results say."""

import json
import re

import pytest

from bench import record, report
from bench.registry import CLAIMS
from bench.report import tables
from bench.visit.lines import merged


@pytest.fixture(scope="module")
def results():
    return report.load()


def test_pages_agree_with_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_result_is_noticed(results, tmp_path, monkeypatch, capsys):
    """The same pages beside other numbers are out of date."""
    for page in report.pages(*results):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((record.ROOT / page).read_text())
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
    page = (record.ROOT / "docs" / "benchmarks.md").read_text()
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
            assert all(gate["ok"] for gates in data["gates"].values() for gate in gates), name


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
    made = report.pages(records | {"nvidia-h100-2026-11-28.json": found | {"parts": {}}},
                        solvers, code)  # fmt: skip
    lines = made["docs/gpu-visit.md"]["predicted"].splitlines()
    (measured,) = [line for line in lines if "3.21 us" in line]
    assert (
        measured.startswith("| `multistep_step plms 4x4x64x64`") and "measured NVIDIA" in lines[0]
    )
    assert sum(tables.NOT_YET in line for line in lines) == len(lines) - 3
    assert "3.21 us" in made["docs/kernels.md"]["times multistep_step"]


def test_occupancy_by_the_first_resource_that_ends():
    assert tables.occupancy(32, 256, 0) == (64, "registers")  # both end together
    assert tables.occupancy(56, 256, 0) == (32, "registers")
    assert tables.occupancy(20, 128, 100 << 10) == (8, "shared memory")
    assert tables.occupancy(16, 32, 0) == (32, "blocks")


def test_every_claim_has_its_number(results):
    records, _, _ = results
    for claim in CLAIMS:
        assert any(
            claim.baseline in case["over_ours"]
            for data in records.values()
            for case in data["cases"].values()
            if (case["entry"], case["row"]) == (claim.entry, claim.row)
        ), claim


def test_a_page_without_its_marks_is_named():
    with pytest.raises(SystemExit, match=r"page\.md must hold.*bench:begin x"):
        report.filled("page.md", "no marks", {"x": "text"})


@pytest.mark.parametrize(
    "value, words", [(0, "0 B"), (3, "3.00 B"), (999.6, "1.00 kB"), (12.6e6, "12.6 MB")]
)
def test_sizes(value, words):
    assert tables.size(value) == words


def test_losses_are_bold():
    assert tables.times(0.876) == "**0.88x**" and tables.times(12.34) == "12.3x"


def test_an_entry_measured_apart_takes_the_place_of_the_older_one(tmp_path, monkeypatch):
    """Newer parts only, of the same machine, and the pages name them."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    head = {"schema": record.SCHEMA, "device": "cpu", "cpu": "x", "torch": "2", "threads": [1],
            "quick": False, "complete": True, "commit": "a", "date": "2026-05-02"}  # fmt: skip
    case = lambda entry, us: {f"{entry} case": {"entry": entry, "p50_us": us}}
    whole = tmp_path / "cpu-2026-05-02.json"
    whole.write_text(json.dumps({**head, "gates": {"a": [], "b": []},
                                 "cases": case("a", 1) | case("b", 2)}))  # fmt: skip
    part = {**head, "entries": ["b"], "gates": {"b": [{"ok": True}]}, "cases": case("b", 3)}
    (tmp_path / "cpu-2026-05-03-b.json").write_text(json.dumps({**part, "commit": "c"}))
    (tmp_path / "cpu-2026-05-01-a.json").write_text(json.dumps({**part, "entries": ["a"]}))
    assert record.latest("cpu") == whole
    found = record.completed(whole)
    assert {n: c["p50_us"] for n, c in found["cases"].items()} == {"a case": 1, "b case": 3}
    assert list(found["parts"]) == ["b"] and found["parts"]["b"]["commit"] == "c"
    (tmp_path / "cpu-2026-05-03-b.json").write_text(json.dumps({**part, "cpu": "y"}))
    with pytest.raises(SystemExit, match="does not go with"):
        record.completed(whole)
