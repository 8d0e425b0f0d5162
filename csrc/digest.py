"""What the extension was built from, in twelve digits: setup.py writes it into build_info()."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """Of every source file in csrc/ and of setup.py, names and contents."""
    sources = [p for p in (root / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h")]
    found = hashlib.sha256()
    for path in sorted([*sources, root / "setup.py"]):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]
