"""Describes the machine in one line, without which the figures mean nothing."""

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("trio", "msgpack", "attrs")


def machine_line() -> str:
    """CPU, cores, kernel, Python, the versions that matter, and the load before the measurement."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{_cpu_model()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}, {versions}; load before: {load}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def filesystem_of(path: Path) -> str:
    """The type of the file system that contains `path`: an fsync costs nothing on tmpfs."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, fs_type, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, fs_type
    return kind
