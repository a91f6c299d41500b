"""The files around the package: citation, workflows, templates, packaging."""

import re
import tomllib
from pathlib import Path

import yaml

from crate_kernels.version import __version__

ROOT = Path(__file__).parents[1]


def test_the_citation_names_the_version_and_the_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    for reference in [citation, *citation["references"]]:
        assert reference["title"]
        assert all(author.keys() in ({"name"}, {"family-names", "given-names"}) for author in reference["authors"])


def test_the_citation_names_every_crate_paper_that_the_readme_links():
    cited = {reference["url"] for reference in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]}
    linked = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", (ROOT / "README.md").read_text()))
    assert linked <= cited


def test_workflows_run_the_ci_script_and_nothing_else():
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            assert commands == [".ci/run"], f"{path.name} runs {commands}"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"


def test_issue_forms_are_complete():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert form["name"], path
        assert form["description"], path
        assert all(field["attributes"]["label"] for field in form["body"] if field["type"] != "markdown"), path


def test_the_package_declares_its_type_hints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "crate_kernels" / "py.typed").is_file()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["crate_kernels"]


def test_the_contributors_guide_names_only_files_that_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:crate_kernels|tests|csrc|benchmarks|docs|ops|models|bench)/[\w./]+)[`:]", guide):
        places = [ROOT / name, ROOT / "crate_kernels" / name]
        assert any(place.exists() for place in places), f"CONTRIBUTING.md names {name}, which does not exist"
