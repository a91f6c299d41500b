"""The emulated machine against its specification: the fragment layouts of the PTX ISA, and the faults it must catch."""

import re
import subprocess
import sys

import pytest
import torch

from . import budget, emulator, planted

# PTX ISA, "Matrix fragments for mma.m16n8k16": groupID = lane >> 2, threadID_in_group = lane % 4, and for element i of
# the fragment (row, column) are
#   A: row = groupID for i in {0, 1, 4, 5}, else groupID + 8;  column = 2 threadID + (i & 1), + 8 for i >= 4
#   B: row = 2 threadID + (i & 1), + 8 for i >= 2;             column = groupID
#   C: row = groupID for i < 2, else groupID + 8;              column = 2 threadID + (i & 1)


def a_element(lane, i):
    return lane // 4 + (8 if i in (2, 3, 6, 7) else 0), lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def b_element(lane, i):
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def c_element(lane, i):
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def registers(matrix, element, count):
    """The 16-bit ``matrix`` as every lane's registers, two elements each, the first in the low half."""
    bits = matrix.view(torch.int16).to(torch.int64) & 0xFFFF
    packed = [
        [int(bits[element(lane, 2 * r)] | bits[element(lane, 2 * r + 1)] << 16) for r in range(count)]
        for lane in range(32)
    ]
    return torch.tensor(packed).numpy().astype("uint32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mma(simt, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 16, generator=generator).to(dtype), torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    lanes = torch.tensor([[float(c[c_element(lane, i)]) for i in range(4)] for lane in range(32)])
    out = simt.module.mma(
        str(dtype).removeprefix("torch."), registers(a, a_element, 4), registers(b, b_element, 2), lanes.numpy()
    )
    expected = a.double() @ b.double() + c.double()
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == pytest.approx(float(expected[c_element(lane, i)]), abs=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(simt, transposed):
    # Four matrices of 8 rows of 16 bytes; lane 8 m + r gives the address of row r of matrix m, in any order. Thread l
    # receives of matrix m the elements (l / 4, 2 (l % 4)) and the next, or with .trans those of the transposed matrix.
    halves = torch.randperm(32 * 8, generator=torch.Generator().manual_seed(0))
    row_of_lane = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    rows = halves.view(32, 8)[row_of_lane]
    words = (halves[0::2] | halves[1::2] << 16).numpy().astype("uint32")
    out = simt.module.load_matrix(words, (16 * row_of_lane).numpy().astype("uint32"), transposed)
    for lane in range(32):
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            first, second = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert out[lane, m] == int(first | second << 16)


def test_movmatrix(simt):
    matrix = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(8, 8)

    def held(m):
        return torch.tensor([int(m[l // 4, 2 * (l % 4)] | m[l // 4, 2 * (l % 4) + 1] << 16) for l in range(32)])  # noqa: E741

    out = simt.module.transpose_matrix(held(matrix).numpy().astype("uint32"))
    assert out.tolist() == held(matrix.T).tolist()


def test_shuffle_and_vote(simt):
    values = torch.arange(32.0)
    for mask in (1, 2, 4, 8, 16, 31):
        assert simt.module.shuffle_xor(values.numpy(), mask).tolist() == [float(l ^ mask) for l in range(32)]  # noqa: E741
    assert simt.module.warp_any(7)
    assert not simt.module.warp_any(32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_conversions_round_as_torch_does(simt, dtype):
    format = str(dtype).removeprefix("torch.")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for bits in every[::37].tolist():
        exact = torch.tensor([bits], dtype=torch.int16).view(dtype).float().item()
        lo, hi = simt.module.unpack(format, (bits & 0xFFFF) << 16)
        assert lo == 0
        assert hi == exact or (hi != hi and exact != exact)
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(2000, generator=generator) * torch.exp2(torch.randint(-30, 20, (2000,), generator=generator))
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25, torch.inf, -0.0]
    )
    for value in torch.cat([floats, ties]):
        word = simt.module.pack(format, value.item(), 0.0)
        assert word == int(value.to(dtype).view(torch.int16)) & 0xFFFF


def test_asynchronous_copies_land_when_they_are_waited_for(simt):
    words = torch.arange(256).numpy().astype("uint32")
    assert simt.module.copy_async(words, 0, 0) == 0
    assert simt.module.copy_async(words, 0, 1) == 128
    assert simt.module.copy_async(words, 1, 0) == 0  # the older group has landed, the newer may be in flight
    with pytest.raises(simt.module.SimtError, match="uninitialized"):
        simt.module.copy_async(words, 1, 1)


def test_a_clean_kernel_runs_clean(simt):
    for seed in range(5):
        out = simt.module.faulty("none", simt.module.Options(shuffle_seed=seed))
        assert out == [1000 + 63 - i for i in range(64)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no barrier", "uninitialized|race"),
        ("warp barrier only", "uninitialized|race"),
        ("out of bounds", "out of bounds: thread 0"),
        ("misaligned", "misaligned: thread 9"),
        ("divergence", "thread 3 .* waits at vote for lanes that never come"),
        ("lost lane", "reached by 63 of 64"),
        ("lost thread", "reached by 32 of 64"),
    ],
)
def test_faults_are_caught(simt, fault, message):
    with pytest.raises(simt.module.SimtError, match=message):
        simt.module.faulty(fault)


def test_a_shuffled_schedule_shows_a_missing_barrier_in_the_values(simt):
    expected = simt.module.faulty("none")
    options = [simt.module.Options(shuffle_seed=seed, check_races=False) for seed in range(1, 9)]
    assert any(simt.module.faulty("no barrier", o) != expected for o in options)


@pytest.mark.parametrize(("stride", "conflicts"), [(4, 0), (8, 1), (16, 3), (128, 31), (132, 0), (36, 0)])
def test_bank_conflicts(simt, stride, conflicts):
    assert simt.module.strided_store(stride).bank_conflicts == conflicts


# -- faults planted in the real kernels -------------------------------------------------------------------------------


def head():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 197, 1, 48, generator=generator).bfloat16()


@pytest.fixture(scope="module")
def committed(simt, tmp_path_factory):
    """Each planted fault, and none -> what the kernels gave for a head; only width 48 in bfloat16 is built."""
    folder = tmp_path_factory.mktemp("planted")
    sources = emulator.in_bfloat16(folder, (48,))
    planted.plant(sources)
    module = emulator.build(sources=sources)
    w, grad = head()
    o, lse, _ = simt.attention(w)
    torch.save([w, grad, o, lse], folder / "in")
    command = [sys.executable, "-m", "tests.cuda.planted", module, folder / "in", folder / "out"]
    subprocess.run(command, cwd=emulator.ROOT, check=True)
    return torch.load(folder / "out")


def test_the_same_build_without_a_fault_is_clean(simt, committed):
    got = committed["none"]
    w, grad = head()
    o, lse, _ = simt.attention(w)
    assert torch.equal(got["forward"], o)
    assert all(torch.equal(shuffled, o) for shuffled in got["shuffled"])
    assert torch.equal(got["backward"], simt.attention_backward(grad, w, o, lse)[0])


def test_a_removed_barrier_is_caught(simt, committed):
    got = committed["no barrier"]
    assert re.match("race|uninitialized", got["forward"])
    expected, _, _ = simt.attention(head()[0])
    assert any(not torch.equal(shuffled, expected) for shuffled in got["shuffled"])


def test_a_removed_barrier_is_caught_in_the_backward(committed):
    assert re.match("race|uninitialized", committed["no barrier in the backward"]["backward"])


def test_too_little_shared_memory_is_caught(committed):
    assert committed["too little shared memory"]["forward"].startswith("out of bounds")


def test_a_wrong_fragment_index_is_caught(committed):
    w, grad = head()
    exact, _ = budget.attention(w.double(), grad.double())
    reference, _ = budget.attention(w, grad)
    with pytest.raises(AssertionError, match="error"):
        budget.check(committed["wrong fragment index"]["forward"], exact, reference)
