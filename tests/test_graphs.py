"""The bookkeeping of CUDA graphs, with a stand-in for a graph that records torch's operators and runs them again.

``tests/cuda/test_gpu.py`` captures real graphs.
"""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crate_kernels import graphs, ops
from crate_kernels.models import CRATE
from crate_kernels.nn import prepare_for_inference


class Graph(TorchDispatchMode):
    """Repeats the operators recorded during capture, and reads and writes the same memory."""

    captures = replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        type(self).replays += 1
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, tuple | list) else (x,) for x in (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph, stream):
    assert not torch.is_autocast_cache_enabled()  # cached tensors no longer exist when the graph is replayed
    Graph.captures += 1
    with graph:
        yield


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    for name, value in {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    Graph.captures = Graph.replays = 0
    torch.manual_seed(0)
    model = CRATE(image_size=16, patch_size=8, num_classes=3, dim=16, depth=2, heads=2, dim_head=8)
    with ops.use_backend("eager"):
        yield prepare_for_inference(model, cuda_graph=True)


def images(batch, seed=0, **options):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(**options)


def plain(model, x):
    return model.forward.plain(x) if isinstance(model.forward, graphs.Graphs) else model(x)


def check(model, x, captures, replays):
    """The call returns the result of the plain forward, after the given numbers of captures and replays."""
    with torch.inference_mode():
        got = model(x)
        torch.testing.assert_close(got, plain(model, x))
    assert (Graph.captures, Graph.replays) == (captures, replays)
    return got


def test_one_graph_for_each_kind_of_input(model):
    first = check(model, images(2), 1, 1)
    kept = first.clone()
    check(model, images(2, seed=1), 1, 2)
    assert torch.equal(first, kept)  # a copy: the second call has not written to it
    check(model, images(5), 2, 3)
    check(model, images(2, seed=2), 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, images(2), 3, 5)
    with ops.use_backend("reference"):
        check(model, images(2), 4, 6)
    strided = images(2).to(memory_format=torch.channels_last)
    check(model, strided, 4, 7)


def test_the_graph_unused_for_longest_is_dropped(model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    for batch, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        with torch.no_grad():
            model(images(batch))
        assert Graph.captures == captures
    assert len(model.forward.captured) == 2


@torch.no_grad()
def _scale(model):
    for parameter in model.parameters():
        parameter.mul_(1.25)


def _load(model):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_scale, _load])
def test_changed_weights_drop_the_graphs(model, change):
    before = check(model, images(2), 1, 1)
    change(model)
    after = check(model, images(2), 2, 2)
    assert not torch.allclose(before, after)
    check(model, images(2), 2, 3)


def test_the_plain_forward_runs_where_a_graph_would_be_wrong(model, monkeypatch):
    x = images(2)
    model(x).sum().backward()  # a gradient is required
    assert model.head.weight.grad is not None if hasattr(model, "head") else True
    seen = []
    handle = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)).register_forward_hook(
        lambda *a: seen.append(a)
    )
    with torch.no_grad():
        model(x)
    assert seen
    handle.remove()
    with torch.no_grad():
        model.train()(x)
        assert not model.eval().forward.captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        model(x)
    monkeypatch.setattr(graphs, "DEVICE", "cuda")  # the tensors are on a CPU
    with torch.no_grad():
        model(x)
    assert (Graph.captures, Graph.replays) == (0, 0)


def test_a_copy_captures_its_own_graphs(model):
    check(model, images(2), 1, 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.forward.model is twin
        assert not twin.forward.captured
        _scale(twin)
        with torch.no_grad():
            torch.testing.assert_close(twin(images(2)), plain(twin, images(2)))
            assert not torch.allclose(twin(images(2)), model(images(2)))


def test_prepared_anew(model):
    check(model, images(2), 1, 1)
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
    prepare_for_inference(model, cuda_graph=True)
    check(model, images(2), 2, 2)
    prepare_for_inference(model)
    check(model, images(2), 2, 2)  # no graphs any more


def test_a_forward_that_cannot_be_captured_says_what_to_do(model, monkeypatch):
    def refuse(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with torch.no_grad(), pytest.raises(RuntimeError, match="prepare the model without cuda_graph=True"):
        model(images(2))


def test_without_a_device_preparing_fails():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="cuda_graph=True needs a CUDA device"):
        prepare_for_inference(model, cuda_graph=True)
    assert "forward" not in model.__dict__
