"""What numbers are taken on and with."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff import _ext
from fastdiff.app.machine import cpu_model

from .files import RESULTS
from .record import SCHEMA, commit, first_line


def machine(device: torch.device) -> dict[str, Any]:
    """The head of a record."""
    import triton

    found: dict[str, Any] = {
        "schema": SCHEMA,
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "extension": _ext.build_info() or _ext.reason,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
        found["driver"] = first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def slug(device: torch.device) -> str:
    """<device>-<today>: what a record is called."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{name}-{datetime.date.today().isoformat()}"


def result_path(device: torch.device, only: Sequence[str] = ()) -> Path:
    """In bench/results/; with the entries in its name where it has not all."""
    return RESULTS / f"{'-'.join([slug(device), *only])}.json"
