"""What a measurement belongs to, and how it is written down."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gq_lightning.files import write_whole


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions and accelerator, without the machine's name or paths."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_ratios(content: dict[str, Any], path: Path, ratios: dict[str, float], wanted: dict[str, float]) -> None:
    """Writes `content` with its ratios to a reference that was measured in the same run, and prints them beside those of the file before.

    Args:
        ratios: time over the reference's time, by name.
        wanted: the most that is wanted, for some of them.
    """
    before = json.loads(path.read_text()).get("ratios", {}) if path.exists() else {}
    rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
    write({**content, "ratios": rounded, "ratios_before": before, "wanted": wanted}, path)
    table = Table("time to the reference's", "now", "before", "wanted, at most", title=path.name)
    for name, ratio in rounded.items():
        table.add_row(name, str(ratio), str(before.get(name, "")), str(wanted.get(name, "")))
    Console().print(table)


def write(content: dict[str, Any], path: Path) -> None:
    """JSON, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def peak() -> float:
    """MiB at most since the last call: allocated on the GPU, else resident, where the system tells (Linux)."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, StopIteration):
        return 0.0
    return peak
