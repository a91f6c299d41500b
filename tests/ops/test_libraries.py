"""The sentences that describe the compiled libraries, from the record that the build writes."""

import json

import pytest

from crate_kernels.ops import libraries

BUILT = {
    "cpu": {"missing": "a C++ compiler was not found"},
    "cuda": {
        "missing": None,
        "compiler": "GNU 12.2.0, nvcc 13.0.88",
        "architectures": ["sm_80", "compute_90"],
        "left_out": {"products": "cublasLt.h was not found"},
    },
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "PACKAGE", tmp_path)
    return tmp_path


def test_a_package_that_was_not_built_says_so(package):
    assert libraries.record() == {}
    assert libraries.report()["cuda"] == "not built: the package was not installed with `pip install`"
    with pytest.raises(libraries.Missing, match="the cuda library was not built: the package was not installed"):
        libraries.load("cuda", 1, {})


def test_the_record_of_the_build_in_words(package):
    (package / "_build.json").write_text(json.dumps(BUILT))
    assert libraries.report() == {
        "cpu": "not built: a C++ compiler was not found",
        "cuda": "built with GNU 12.2.0, nvcc 13.0.88 for sm_80, compute_90; without products: cublasLt.h was not found",
    }
    with pytest.raises(libraries.Missing, match=r"the cpu library was not built: a C\+\+ compiler was not found"):
        libraries.load("cpu", 1, {})
