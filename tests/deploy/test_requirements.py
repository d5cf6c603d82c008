"""deploy/requirements-*.txt: every package that a documented install needs, in its tested version, with hashes."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ; [^\\\n]+)? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)
EXTRAS = {
    "relay": ["relay"],
    "audio": ["audio"],
    "gpuworker": ["voxcpm"],
    "webrtc": ["webrtc"],
    "face": ["face"],
    "torch": [],
}


def name_of(package: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", package)
    assert found is not None
    return re.sub(r"[._-]+", "-", found[0]).lower()


def requirements(name: str) -> dict[str, str]:
    """Package -> version of a file in which there is nothing but packages with hashes."""
    text = (ROOT / "deploy" / f"requirements-{name}.txt").read_text()
    assert PACKAGE.sub("", text) == "", "each package has hashes, and no registry is named"
    return {name_of(package): version for package, version, _hashes in PACKAGE.findall(text)}


@pytest.mark.parametrize("name", EXTRAS)
def test_every_package_that_is_needed_is_there_in_its_tested_version(name: str) -> None:
    there = requirements(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {name_of(each) for each in project["dependencies"]} if EXTRAS[name] else {"torch"}
    needed |= {name_of(each) for extra in EXTRAS[name] for each in project["optional-dependencies"][extra]}
    if name == "gpuworker":
        needed = needed - {"torch"} | {"voxcpm"}
    if name in ("gpuworker", "relay", "webrtc", "face"):
        needed |= {name_of(each) for each in ("hatchling",)}  # it builds relayd itself
    assert needed <= there.keys()
    pins = dict(re.findall(r"^([^=\s#]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    tested = {name_of(package): version for package, version in pins.items()}
    assert {package: tested.get(package, version) for package, version in there.items()} == there


def test_torch_and_its_cuda_packages_are_in_a_file_of_their_own() -> None:
    cuda = {package for package in requirements("torch") if re.match("torch$|triton|nvidia-|cuda-", package)}
    assert {"torch", "triton"} <= cuda
    assert not cuda & requirements("gpuworker").keys()
