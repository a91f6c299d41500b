"""Loops and instructions of machine code, and the predictions from them. Nothing is compiled here."""

import math

import pytest
import torch

from crate_kernels.bench import compile_report, machine_code, predict
from crate_kernels.bench.cases import Case
from crate_kernels.bench.compilation import Launch
from crate_kernels.bench.machine_code import Instruction, Program
from crate_kernels.cli import main

LAID_OUT_OF_LINE = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   LDL R3, [R1+0x4] ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;
        /*0080*/                   LDL R3, [R1+0x4] ;
        /*0090*/                   BRA `(.L_x_1) ;
"""

NESTED = """
        /*0000*/                   IMAD R0, R0, R1, R2 ;
.L_outer:
        /*0010*/                   FFMA R2, R0, R1, R2 ;
.L_inner:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   MUFU.EX2 R3, R3 ;
        /*0040*/                   DEPBAR.LE SB0, 0x2 ;
        /*0050*/               @P0 BRA `(.L_inner) ;
        /*0060*/               @P1 BRA `(.L_outer) ;
        /*0070*/               @P2 BRA `(.L_end) ;
        /*0080*/                   LDS.128 R4, [R8] ;
        /*0090*/                   LDS.128 R8, [R8] ;
.L_end:
        /*00a0*/                   EXIT ;
"""


def test_loops_are_told_from_code_that_is_laid_out_of_line():
    program = machine_code.read_nvidia(LAID_OUT_OF_LINE)
    assert " ".join(i.mnemonic for i in program.instructions) == "STL LDL BRA BRA EXIT LDL BRA BRA LDL BRA"
    # Lines 5 and 6 are after the loop and belong to it. The last three are never reached.
    assert [loop.own for loop in program.loops] == [(1, 2, 3, 5, 6)]


def test_each_loop_of_a_nest_has_its_own_instructions():
    program = machine_code.read_nvidia(NESTED)
    outer, inner = program.loops
    assert (outer.own, inner.own) == ((1, 6), (2, 3, 4, 5))
    assert machine_code.counts(program.of(inner)) == {"control": 1, "exponential": 1, "matrix": 1, "synchronization": 1}
    assert machine_code.copies_in_flight(program.of(inner)) == [2]
    assert program.product_loops() == [inner]


def test_the_longest_way_counts_each_loop_as_often_as_it_runs():
    program = machine_code.read_nvidia(NESTED)
    outer, inner = program.loops
    ran = program.path({outer: 3, inner: 5})
    times = {}
    for instruction, count in ran:
        times[instruction.mnemonic] = times.get(instruction.mnemonic, 0) + count
    assert times == {"IMAD": 1, "FFMA": 3, "HMMA": 15, "MUFU": 15, "DEPBAR": 15, "BRA": 15 + 3 + 1, "LDS": 2, "EXIT": 1}
    assert sum(i.flops * count for i, count in ran) == 15 * 2 * 16 * 8 * 16
    assert sum(i.shared_bytes * count for i, count in ran) == 2 * 32 * 16


def test_the_way_avoids_a_loop_that_does_not_run():
    branch = [Instruction("BRA")]
    product = Instruction("HMMA.16816.F32")
    # 0 -> 1 (a loop of ten) -> 3, or 0 -> 2 (a loop of one) -> 3
    program = Program([*branch, product, Instruction("FADD"), Instruction("EXIT")], [(1, 2), (1, 3), (2, 3), ()])
    long, short = program.loops
    assert [i.mnemonic for i, _ in program.path({long: 10, short: 1})] == ["BRA", "HMMA", "EXIT"]
    assert [i.mnemonic for i, _ in program.path({long: 0, short: 1})] == ["BRA", "FADD", "EXIT"]


def test_products_that_wait_one_by_one_are_serialized():
    product, wait = Instruction("HGMMA.64x64x16.F32.BF16"), Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    assert machine_code.serialized([product, wait, product, wait])
    assert not machine_code.serialized([product, product, wait])
    assert product.flops == 2 * 64 * 64 * 16 / 4


def test_amd_assembly():
    program = machine_code.read_amd("""
kernel:                                 ; @kernel
	s_load_dwordx2 s[6:7], s[4:5], 0x0
.LBB0_1:
	.loc	1 296 12                        ; a comment
	v_mfma_f32_32x32x8bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v1, v1
	v_mul_f32_e32 v1, v1, v2
	ds_read_b128 v[0:3], v4
	s_waitcnt lgkmcnt(0)
	s_cbranch_scc1 .LBB0_1
	s_endpgm
""")
    (loop,) = program.loops
    assert machine_code.counts(program.of(loop)) == {
        "control": 1, "exponential": 1, "fp32": 1, "matrix": 1, "shared memory": 1, "synchronization": 1,
    }  # fmt: skip


# -- predictions ---------------------------------------------------------------------------------------------------


def product_launch(flops_each=2 * 16 * 8 * 16, registers=128, programs=264):
    """A product of 16 x 8 x 64: one warp, a loop of four rounds of one matrix instruction and eight others."""
    names = ["HMMA.16816.F32.BF16", *["FFMA"] * 7, "BRA"]
    program = Program([*map(Instruction, names), Instruction("EXIT")], [*((i + 1,) for i in range(8)), (0, 9), ()])
    arguments = dict(inner=64, BLOCK_M=16, BLOCK_N=8, BLOCK_K=16 * flops_each // (2 * 16 * 8 * 16))
    arguments["a"] = torch.empty(100, 64, dtype=torch.bfloat16, device="meta")
    return Launch("sm_90", "product", programs, arguments, {}, 0, 1, program, registers, 0)


def test_a_prediction_follows_its_formula():
    launch, device = product_launch(), predict.DEVICES["sm_90"]
    found = predict.predict(launch, device)
    # Two programs for each of 132 multiprocessors; four rounds and the EXIT.
    assert math.isclose(found.units["issue"], 2 * (4 * 9 + 1) / 4 / device.clock)
    assert math.isclose(found.units["matrix"], 264 * 4 * 2 * 16 * 8 * 16 / device.product)
    assert math.isclose(found.units["fp32"], 2 * 4 * 7 * 32 / 128 / device.clock)
    assert math.isclose(found.units["memory"], 100 * 64 * 2 / device.copy)
    assert found.limited_by == "issue"
    on_chip = max(found.units["issue"], found.units["matrix"])
    other = min(found.units["issue"], found.units["matrix"])
    assert math.isclose(found.seconds, on_chip + other / 2)  # both programs are resident


def test_a_prediction_refuses_loops_that_it_misread():
    with pytest.raises(RuntimeError, match="operations in the machine code"):
        predict.predict(product_launch(flops_each=2 * 2 * 16 * 8 * 16), predict.DEVICES["sm_90"])


def test_programs_of_a_multiprocessor():
    assert product_launch(registers=128).blocks == 16  # 65,536 registers of which a warp takes 4,096
    assert product_launch(registers=129).blocks == 12  # a warp takes 4,352, a quarter holds three
    assert product_launch(registers=16).blocks == 32  # the most


def test_a_target_without_published_rates_is_refused():
    with pytest.raises(ValueError, match="--target must be one of"):
        predict.text("gfx942", [Case("subspace_attention", "tiny", 1, 20, 2, 16)])


def test_without_the_disassembler_the_command_says_what_is_missing(monkeypatch, tmp_path, capsys):
    triton = pytest.importorskip("triton")
    machine_code.tool.cache_clear()
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    try:
        assert main(["bench", "--predict"]) == 2
    finally:
        machine_code.tool.cache_clear()
    assert "needs nvdisasm, but the installed Triton does not have it" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--predict", "--quick"], ["--predict", "--dispatch"], ["--target", "sm_80"]])
def test_options_that_do_not_go_with_a_prediction_are_refused(words, capsys):
    assert main(["bench", *words]) == 2
    assert "applies only" in capsys.readouterr().err


# -- the budget ----------------------------------------------------------------------------------------------------


def row(**changes):
    counts = dict.fromkeys(compile_report.UNITS, 20) | {"in flight": [2]}
    about = dict(target="sm_90", case="layer", kernel="product", registers=128, looped_spills=0, loops=[counts])
    return about | changes


def grown(**changes):
    loop = row()["loops"][0] | {key.replace("_", " "): value for key, value in changes.items()}
    return row(loops=[loop])


@pytest.mark.parametrize(
    ("now", "what"),
    [
        (row(registers=137), "137 registers, budget 128"),
        (row(looped_spills=1), "1 spills in loops, budget 0"),
        (grown(integer=26), "loop 1: 26 integer instructions, budget 20"),
        (grown(in_flight=[0]), "loop 1: waits with 0 copies in flight, budget 2"),
        (grown(in_flight=[]), "loop 1: waits with 0 copies in flight, budget 2"),
        (row(loops=[]), "0 loops, budget 1"),
        (row(kernel="new"), "the budget does not have it"),
    ],
)
def test_a_kernel_that_grows_exceeds_its_budget(now, what):
    compiler = {"nvcc": "13.0.88"}
    allowed = compile_report.budget([row()], compiler)
    assert compile_report.over_budget([row()], allowed, compiler) == []
    for close in (grown(integer=25), row(registers=136)):
        assert compile_report.over_budget([close], allowed, compiler) == []
    (found,) = compile_report.over_budget([now], allowed, compiler)
    assert what in found
    assert compile_report.over_budget([now], allowed, {"nvcc": "13.1.0"}) == []


def test_several_launches_of_one_kernel_have_their_own_budgets():
    rows = [row(), row(registers=100), row(case="ista")]
    assert list(compile_report.named(rows)) == [
        "sm_90, layer, product",
        "sm_90, layer, product 2",
        "sm_90, ista, product",
    ]


def test_every_version_of_triton_is_held_to_what_is_always_a_fault():
    about = dict(shared=0, serialized=False, spilled=0, num_stages=3)
    assert compile_report.faults(row(**about)) == []
    assert compile_report.faults(grown(in_flight=[0, 2]) | about) == ["no prefetch"]
    assert compile_report.faults(row(**about | dict(serialized=True))) == ["serialized"]
    assert compile_report.faults(row(**about | dict(shared=1 << 20))) == ["shared memory"]
