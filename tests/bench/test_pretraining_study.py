"""The page of the study of pretraining shows the committed results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_results(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pretraining_study

    records = map(json.loads, (ROOT / "benchmarks" / "results" / "pretraining_study.jsonl").read_text().splitlines())
    table = pretraining_study.render({record["piece"]: record for record in records})
    page = (ROOT / "docs" / "pretraining_study.md").read_text()
    assert f"<!-- study:begin -->\n{table}\n<!-- study:end -->" in page
