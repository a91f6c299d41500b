"""The C interface of the CUDA library: its declarations, and what it refuses."""

import ctypes
import re

import pytest
import torch

from crate_kernels.ops import cuda_kernels, libraries

from .emulator import SOURCES

TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "const char*": ctypes.c_char_p,
    "void*": ctypes.c_void_p,
    "const void*": ctypes.c_void_p,
    "float*": ctypes.c_void_p,
    "const float*": ctypes.c_void_p,
    "const int32_t*": ctypes.c_void_p,
}


def test_python_and_the_header_declare_the_same_functions():
    header = (SOURCES / "cuda" / "interface.h").read_text()
    declared = {}
    for result, name, arguments in re.findall(r"^CRATE_API (.+?) ?crate_cuda_(\w+)\(([^)]*)\);", header, re.MULTILINE):
        types = [] if arguments == "void" else [a.strip().rsplit(maxsplit=1)[0] for a in arguments.split(",")]
        declared[name] = tuple(TYPES[t] for t in (result, *types))
    assert declared.pop("interface") == (ctypes.c_int,)
    assert declared == cuda_kernels.FUNCTIONS


def test_a_library_of_another_interface_is_not_loaded(simt):
    with pytest.raises(
        libraries.Missing,
        match=rf"has interface {cuda_kernels.INTERFACE}, the package needs 77: run `pip install` again",
    ):
        libraries.open_library(simt.module.__file__, "cuda", 77, cuda_kernels.FUNCTIONS)


def test_a_library_without_a_function_is_not_loaded(simt):
    with pytest.raises(libraries.Missing, match=r"does not load: .*crate_cuda_nonsense"):
        libraries.open_library(simt.module.__file__, "cuda", cuda_kernels.INTERFACE, {"nonsense": (ctypes.c_int,)})


def test_a_file_that_is_no_library_is_not_loaded(tmp_path):
    (tmp_path / "_cuda.so").write_text("not a library")
    with pytest.raises(libraries.Missing, match="does not load"):
        libraries.open_library(tmp_path / "_cuda.so", "cuda", cuda_kernels.INTERFACE, cuda_kernels.FUNCTIONS)


def w(width=16, tokens=4, dtype=torch.bfloat16):
    return torch.ones(1, tokens, 1, width, dtype=dtype)


def offset(tensor):
    """The same values, two bytes after a 16-byte boundary."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def attention(t, format=0, strides=None):
    o, lse = torch.empty_like(t), torch.empty(t.shape[1])
    batch, tokens, heads, width = t.shape
    pointers = t.data_ptr(), o.data_ptr(), lse.data_ptr(), None
    return *pointers, *(strides or t.stride()[:3]), batch, tokens, heads, width, format, 0.25, False, None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (lambda: attention(w(24)), "no kernel was built for heads of this width"),
        (lambda: attention(w(tokens=273)), "no kernel was built for heads of this width"),
        (lambda: attention(w(), format=2), "the format is not one that the kernel takes"),
        (lambda: attention(w(), strides=(64, 12, 16)), "rows of a head do not begin on 16-byte boundaries"),
        (lambda: attention(offset(w())), "a tensor does not begin on a 16-byte boundary"),
    ],
)
def test_what_would_leave_the_tensors_is_refused(emulated, arguments, reason):
    assert emulated.crate_cuda_attention_forward(*arguments()) == 1
    assert emulated.crate_cuda_error().decode().startswith(f"attention_forward: {reason}")


@pytest.mark.parametrize("columns", [0, 12, 2056])
def test_rows_of_other_lengths_are_refused(emulated, columns):
    arguments = (*11 * [None], 1, columns, 0, 0, False, 1e-5, None)
    assert emulated.crate_cuda_layer_norm_forward(*arguments) == 1
    assert b"the number of columns must be a multiple of 8, up to 2048" in emulated.crate_cuda_error()


@pytest.mark.parametrize(("format", "stream", "reason"), [(2, 2, b"not one that"), (0, 1, b"the residual stream has")])
def test_rows_in_other_formats_are_refused(emulated, format, stream, reason):
    arguments = (*11 * [None], 1, 8, format, stream, False, 1e-5, None)
    assert emulated.crate_cuda_layer_norm_forward(*arguments) == 1
    assert reason in emulated.crate_cuda_error()


def test_a_refusal_becomes_an_exception(emulated):
    with pytest.raises(RuntimeError, match="attention_forward: no kernel was built"):
        cuda_kernels.attention_forward(w(24), None, 0.25, False)


@pytest.mark.parametrize("other", [w(tokens=5), w(dtype=torch.float16)], ids=["shape", "dtype"])
def test_operands_that_do_not_match_are_refused_by_name(emulated, other):
    t = w()
    o, lse = cuda_kernels.attention_forward(t, None, 0.25, False)
    with pytest.raises(ValueError, match=r"grad: expected \(1, 4, 1, 16\) in torch.bfloat16 on cpu, got"):
        cuda_kernels.attention_backward(other, t, None, o, lse, 0.25, False)


def test_nan_survives_a_relu_that_would_drop_it(emulated, monkeypatch):
    a, b, bias = torch.tensor([[torch.nan], [2.0]]), torch.tensor([[1.0, -1.0]]), torch.zeros(2)
    expected = torch.tensor([[torch.nan, torch.nan], [2.0, 0.0]])
    drops = ctypes.c_int.in_dll(emulated, "simt_relu_drops_nan")
    for drops.value in (0, 1):
        cuda_kernels._NAN_KEPT.clear()
        got = cuda_kernels.product(a, b, bias=bias, relu=True)
        torch.testing.assert_close(got, expected, equal_nan=True)
        assert {(a.device, a.dtype, a.dtype): not drops.value} == cuda_kernels._NAN_KEPT
    cuda_kernels._NAN_KEPT.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    torch.testing.assert_close(cuda_kernels.product(a, b, bias=bias, relu=True), expected, equal_nan=True)
    assert not cuda_kernels._NAN_KEPT
    drops.value = 0


MATRICES = {
    "rows": lambda m: m,
    "transposed": lambda m: m.T.contiguous().T,
    "part of wider rows": lambda m: torch.cat([m, m], dim=1)[:, : m.shape[1]],
    "every second column": lambda m: m.repeat_interleave(2, dim=1)[:, ::2],
    "one row, any stride": lambda m: m.as_strided(m.shape, (1, 1)) if m.shape[0] == 1 else m,
}


@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 3, 5), (4, 1, 2), (7, 8, 9)])
def test_products_take_matrices_of_any_layout(emulated, rows, depth, columns, layout):
    draw = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, depth, generator=draw), torch.randn(depth, columns, generator=draw)
    c, bias = torch.randn(rows, columns, generator=draw), torch.randn(columns, generator=draw)
    given = (MATRICES[layout](a.bfloat16()), MATRICES[layout](b.bfloat16()))
    got = cuda_kernels.product(*given, c, bias, alpha=-0.5, relu=True, dtype=torch.float32)
    expected = (-0.5 * (a.bfloat16().double() @ b.bfloat16().double()) + c + bias).relu()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
