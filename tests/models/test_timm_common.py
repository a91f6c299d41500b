"""timm's own model tests on the models of this package, if their source is present.

The installed package does not contain them. The source distribution does. Unpack it and name its folder of tests::

    pip download --no-deps --no-binary :all: timm && tar xzf timm-*.tar.gz
    CRATE_KERNELS_TIMM_TESTS=timm-1.0.31/tests python -m pytest tests/models/test_timm_common.py

``test_timm.py`` checks the same promises without it. Three of timm's checks do not apply: scripts by
``torch.jit.script`` (torch deprecates them), pooling by ``catavgmax``, and dropout before the classifier. The models
refuse the last two by name.
"""

import importlib.util
import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("CRATE_KERNELS_TIMM_TESTS")
if not FOLDER:
    pytest.skip("needs the tests in timm's source distribution", allow_module_level=True)

import crate_kernels.models.timm_registry  # noqa: E402, F401

MARKERS = ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward")


@pytest.fixture(scope="module")
def theirs(request):
    for marker in (*MARKERS, "timeout"):
        request.config.addinivalue_line("markers", f"{marker}: timm's")
    specification = importlib.util.spec_from_file_location("timm_test_models", Path(FOLDER) / "test_models.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


CLASSIFIERS = ["crate_tiny_patch16_224", "crate_alpha_base_patch16_224"]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        ("test_model_forward", (1,)),
        ("test_model_backward", (2,)),
        ("test_model_default_cfgs_non_std", (1, "meta")),
        ("test_model_forward_features", (1,)),
        ("test_model_forward_intermediates_features", (1,)),
        ("test_model_forward_intermediates", (1,)),
        ("test_prune_intermediate_layers_contract", ()),
        ("test_forward_after_prune_intermediate_layers", ()),
        ("test_model_forward_fx", (1,)),
        ("test_model_backward_fx", (2,)),
    ],
)
def test_classifiers(theirs, test, arguments, name):
    getattr(theirs, test)(name, *arguments)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_weights_can_be_filled_after_meta(theirs, name):
    theirs.test_model_init_weights_after_to_empty(name, dict(dim=32, depth=2, heads=2, dim_head=16, img_size=64))


@pytest.mark.parametrize("test", ["test_model_forward_features", "test_model_forward_intermediates"])
def test_autoencoder(theirs, test):
    getattr(theirs, test)("crate_mae_tiny_patch16_224", 1)
