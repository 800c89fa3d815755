"""pyproject.toml, requirements/ and the source tree agree."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTS = {
    "dependencies": "base",
    "hf": "demo",
    "torch": "torch",
    "bench": "bench",
    "plot": "dev",
    "notebook": "dev",
    "tune": "dev",
    "dev": "dev",
}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def read_list(name):
    """Return the pins of requirements/<name>.txt and of the lists it includes."""
    found = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line.startswith("-r "):
            found |= read_list(line.removeprefix("-r ").removesuffix(".txt"))
        elif line and not line.startswith("#"):
            found |= pins([line])
    return found


@pytest.mark.parametrize("extra", LISTS)
def test_every_dependency_is_exact_and_in_its_list(extra):
    project = PROJECT["project"]
    wanted = project["dependencies"] if extra == "dependencies" else None
    wanted = pins(wanted or project["optional-dependencies"][extra])
    listed = read_list(LISTS[extra]) | (read_list("torch") if extra == "bench" else {})
    assert {name: listed.get(name) for name in wanted} == wanted


def test_every_extra_has_a_list():
    assert {"dependencies", *PROJECT["project"]["optional-dependencies"]} == set(LISTS)


def test_lists_do_not_contradict_each_other():
    versions = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in read_list(path.stem).items():
            assert versions.setdefault(name, version) == version, f"{path.name}: {name}"


def test_every_package_folder_is_in_the_wheel():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    folders = {
        ".".join([package, *init.parent.relative_to(ROOT / top).parts])
        for package, top in mapped.items()
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_build_requirement_is_the_installed_one():
    assert pins(PROJECT["build-system"]["requires"]).items() <= read_list("base").items()
