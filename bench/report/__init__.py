"""`python -m bench report`: the committed results as pages and pictures.

In README.md and the pages benchmarks, capture, gpu-visit, haar and kernels of docs/ what stands
between `<!-- bench:begin NAME -->` and `<!-- bench:end -->` is rendered here, from
bench/results/*.json and the registry's formulas and nothing else; the prose around it is written by
hand. `--check` compares instead of writing.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import aot, record
from ..files import RESULTS, ROOT
from . import gpu, kernels, tables

Pages = dict[str, dict[str, str]]  # page -> name of a block -> its text


def load() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The newest record of each device by file name, the solvers' errors, the kernels' code."""
    dated = (re.fullmatch(r"(.+)-\d{4}-\d\d-\d\d", p.stem) for p in RESULTS.glob("*.json"))
    newest = [record.latest(device) for device in sorted({m[1] for m in dated if m})]
    records = {path.name: record.completed(path) for path in newest if path}
    for name, data in records.items():
        if data.get("schema") != record.SCHEMA:
            raise SystemExit(
                f"{name} must have schema {record.SCHEMA}, got {data.get('schema')}: measure again"
            )
    solvers, code = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("solvers", "aot")
    )
    code["kernels"] = [asdict(report) for report in aot.reports(code)]
    code["ptx"] = json.loads((RESULTS / "ptx.json").read_text())
    return records, solvers, code


def pages(records: dict[str, Any], solvers: dict[str, Any], code: dict[str, Any]) -> Pages:
    """What every marked block has to hold."""
    return {
        "README.md": {"": tables.speed(records)},
        "docs/benchmarks.md": {
            "records": "\n\n".join(tables.device(name, data) for name, data in records.items()),
            "solvers": tables.errors(solvers),
        },
        "docs/capture.md": {"": gpu.captured(records)},
        "docs/haar.md": {"": tables.haar(records)},
        "docs/kernels.md": kernels.kernels(records, code),
        "docs/gpu-visit.md": gpu.visit(records, code),
    }


def filled(page: str, text: str, blocks: dict[str, str]) -> str:
    """The page with its blocks renewed."""
    for name, content in blocks.items():
        begin, end = f"<!-- bench:begin{name and ' ' + name} -->", "<!-- bench:end -->"
        before, found, rest = text.partition(begin + "\n")
        if not found or end not in rest:
            raise SystemExit(f"{page} must hold a line {begin} and after it a line {end}")
        text = before + found + content + "\n" + rest[rest.index(end) :]
    return text


def main(given: list[str], root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="Render bench/results/ into pages and pictures."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a page is out of date"
    )
    options = parser.parse_args(given)
    results = load()
    stale = 0
    for page, blocks in pages(*results).items():
        text = (root / page).read_text()
        new = filled(page, text, blocks)
        if options.check and new != text:
            stale += 1
            print(f"{page} is not what bench/results/ gives: run python -m bench report")
        elif not options.check:
            (root / page).write_text(new)
    if options.check:
        return min(stale, 1)
    from .figures import draw

    for path in draw(*results[:2], root / "docs"):
        print(f"wrote {path}")
    return 0
