import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")
