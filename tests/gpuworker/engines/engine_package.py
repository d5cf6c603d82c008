"""An engine of a package of its own, installed for one test: found by its entry point, in slot processes too."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

NAME = "scratch"


def install_engine(folder: Path, patch: pytest.MonkeyPatch, source: str) -> None:
    """Install `source`, which must define a class `Made` of `Engine`, as engine `scratch`; undone with `patch`."""
    (folder / "scratch_engine.py").write_text(textwrap.dedent(source))
    info = folder / "scratch_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scratch-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gpuworker.engines]\n{NAME} = scratch_engine:Made\n")
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "scratch_engine", raising=False)
