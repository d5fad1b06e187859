"""What the benchmarks share: their common options, and how much memory a contender takes."""

import argparse
import sys
from pathlib import Path

import torch


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--threads`` and ``--json``."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")


def set_up(options: argparse.Namespace) -> str:
    """Apply ``--threads``; returns the device, a GPU if there is one and none was named."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_now(device: str) -> float:
    """Bytes that the process (or the GPU) holds."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_now(device: str) -> float:
    """The most bytes that it has held since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def reset_peak(device: str) -> None:
    """Let :func:`peak_now` start from here."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("peak MB is an upper bound: this system cannot reset the mark", file=sys.stderr)


def _status(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return float("nan")
