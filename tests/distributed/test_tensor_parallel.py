"""A model split over ranks equals the model on one device: outputs, gradients, a training step, the state dict."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from crate_kernels.distributed import clip_grad_norm_, tensor_parallel
from crate_kernels.distributed.tensor_parallel import ISTAParallel, MSSAParallel
from crate_kernels.models import CRATE, CrateAlpha, CrateBert, CrateGPT, CrateMAE
from crate_kernels.nn import (
    ISTA,
    MSSA,
    CrateBlock,
    CrateDecoderBlock,
    OvercompleteCrateBlock,
    OvercompleteISTA,
    prepare_for_inference,
)

from .ranks import run_on_ranks

BATCH, TOKENS, DIM, HEADS = 4, 5, 32, 4
VISION = dict(image_size=16, patch_size=8, num_classes=5, dim=DIM, depth=2, heads=HEADS, dim_head=6)
MAE = dict(img_size=16, patch_size=8, embed_dim=DIM, depth=2, num_heads=HEADS, decoder_depth=2)
GPT = dict(block_size=8, vocab_size=29, n_layer=2, n_head=HEADS, n_embd=DIM)
BERT = dict(vocab_size=29, max_length=8, dim=DIM, depth=2, heads=HEADS, emb_dropout=0.0)

MODELS = {
    "crate": lambda: CRATE(**VISION),
    "alpha": lambda: CrateAlpha(**VISION),
    "mae": lambda: CrateMAE(**MAE),
    "gpt": lambda: CrateGPT(**GPT),
    "overcomplete gpt": lambda: CrateGPT(**GPT, overcomplete=True),
    "bert": lambda: CrateBert(**BERT),
    "tied output, rotary": lambda: CrateBlock(DIM, HEADS, 6, tied_output=True, rotary=100.0, shrink=0.1),
    "normalized directions": lambda: CrateBlock(DIM, HEADS, 6, qk_norm=True, mssa_step_size=0.7),
    "no bias, causal, step per channel": lambda: CrateBlock(
        DIM, HEADS, 6, output_bias=False, causal=True, learnable="channel"
    ),
    "step per atom": lambda: OvercompleteCrateBlock(DIM, HEADS, 6, learnable="channel"),
    "one learned step": lambda: OvercompleteCrateBlock(DIM, HEADS, 6, tied=True, residual=False, learnable="scalar"),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))  # no bias is zero, no gain is one
    return model


def run(name, model, rows=slice(None)):
    """An output and a loss of ``model`` on its part of a fixed batch. The loss is a sum over the samples."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)[rows]

    if name in ("crate", "alpha"):
        out = model(normal(3, 16, 16))
    elif name == "mae":
        _, out, _ = model(normal(3, 16, 16), noise=normal(4))
    elif "gpt" in name or name == "bert":
        tokens = torch.randint(29, (BATCH, 7), generator=generator)[rows]
        lengths = torch.tensor([7, 2, 5, 1])[rows]
        out = model(tokens, lengths if name == "bert" else tokens)[0]
    else:
        out = model(normal(TOKENS, DIM))
    return out, (out * normal(*out.shape[1:])).sum()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(got, expected, what=""):
    torch.testing.assert_close(whole(got), expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def assert_equal_gradients(model, reference):
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is None:
            assert parameter.grad is None, name
        else:
            assert_equal(parameter.grad, expected.grad, name)


def equals_one_device(mesh):
    for name in MODELS:
        reference = build(name)
        # The weights differ from the first rank's. tensor_parallel must make them equal.
        model = tensor_parallel(build(name, seed=mesh.get_local_rank()), mesh)
        expected, loss = run(name, reference)
        loss.backward()
        got, loss = run(name, model)
        loss.backward()
        assert_equal(got, expected, name)
        assert_equal_gradients(model, reference)
        with torch.no_grad():
            assert_equal(run(name, prepare_for_inference(model))[0], expected, name)
        for key, parameter in model.named_parameters():
            split = key.endswith(
                ("projection.weight", "output.weight", "ista.weight", ".D", ".D1", "dictionary.weight")
            )
            if split and "patch_embedding" not in key:
                assert parameter.to_local().numel() == parameter.numel() // mesh.size(), key


def a_step_equals_one_device(mesh, wrap=lambda model: model, rows=slice(None), parts=1):
    """Two steps of AdamW with clipped gradients, on the tensor mesh alone or with the batch in ``parts``, averaged."""
    for name in ("crate", "gpt", "alpha"):
        reference, model = build(name), wrap(tensor_parallel(build(name), mesh))
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (reference, model)]
        for _ in range(2):
            run(name, reference)[1].backward()
            (parts * run(name, model, rows)[1]).backward()
            assert_equal_gradients(model, reference)
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            assert expected > 0.5
            assert_equal(clip_grad_norm_(model.parameters(), 0.5), expected)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for (key, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_equal(parameter, expected, key)
        goes_in_and_out_as_ordinary_state(name, model, reference)


def goes_in_and_out_as_ordinary_state(name, model, reference):
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    assert list(state) == list(reference.state_dict())
    for key, expected in reference.state_dict().items():
        assert_equal(state[key], expected, key)
    other = build(name, seed=3).state_dict()
    set_model_state_dict(model, dict(other), options=options)  # which turns what it is given into DTensors
    for (key, got), expected in zip(model.state_dict().items(), other.values(), strict=True):
        assert_equal(got, expected, key)


class Traffic(TorchDispatchMode):
    """The collectives that start inside, each with its number of elements."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        namespace, _, name = operator._schema.name.partition("::")
        if namespace in ("_c10d_functional", "c10d") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.seen.append((name, arguments[0].numel()))
        return operator(*arguments, **(options or {}))


def sends_what_the_guide_says(mesh):
    tokens = BATCH * TOKENS * DIM
    reduce = ("all_reduce", tokens)
    gather = ("all_gather_into_tensor", tokens // mesh.size())
    for block, forward, backward in (
        (CrateBlock(DIM, HEADS, 6), [reduce] * 2, [reduce] * 2),
        (OvercompleteCrateBlock(DIM, HEADS, 6), [reduce] * 3, [reduce] * 3),
        (CrateDecoderBlock(DIM, HEADS, 6), [gather, reduce], [reduce] * 2),
    ):
        tensor_parallel(block, mesh)
        x = torch.randn(BATCH, TOKENS, DIM, requires_grad=True)
        with Traffic() as traffic:
            out = block(x)
        assert traffic.seen == forward, (type(block).__name__, traffic.seen)
        with traffic:
            out.sum().backward()
        assert traffic.seen == backward, (type(block).__name__, traffic.seen)


def drops_the_same_everywhere(mesh):
    torch.manual_seed(0)
    reference = CrateBert(**BERT | dict(emb_dropout=0.5)).double()
    model = tensor_parallel(copy.deepcopy(reference), mesh)
    torch.manual_seed(7)
    expected, loss = run("bert", reference)
    loss.backward()
    torch.manual_seed(7 + mesh.get_local_rank())
    got, loss = run("bert", model)
    loss.backward()
    assert_equal(got, expected)
    assert_equal_gradients(model, reference)
    assert_equal(run("bert", model.eval())[0], run("bert", reference.eval())[0])


def generates_the_same(mesh):
    for name in ("gpt", "overcomplete gpt"):
        reference = build(name).eval()
        model = tensor_parallel(copy.deepcopy(reference), mesh)
        prompt = torch.tensor([[3, 1, 4], [1, 5, 9]])
        got = model.generate(prompt, 5, top_k=1)
        assert torch.equal(got, reference.generate(prompt, 5, top_k=1))


def asks_for_whole_weights(mesh):
    with pytest.raises(RuntimeError, match="get_model_state_dict"):
        tensor_parallel(build("crate"), mesh).save("never_written.safetensors")


def refuses(mesh):
    ranks = mesh.size()
    for module, sentence in (
        (MSSA(8, 1, 8), "no output projection to split"),
        (MSSA(8, 1, 4), f"1 heads cannot be shared out over {ranks} ranks"),
        (MSSA(8, 2 * ranks + 1, 4), f"{ranks} ranks do not divide the {2 * ranks + 1} heads"),
        (MSSA(8, ranks, 4, dropout=0.1), "dropout = 0.1 would differ between the ranks"),
        (ISTA(9), f"{ranks} ranks do not divide the 9 rows"),
        (OvercompleteISTA(3, expansion=3), f"{ranks} ranks do not divide the 9 atoms"),
        (CrateDecoderBlock(9, ranks, 2), f"{ranks} ranks do not divide the 9 rows"),
        (nn.Linear(4, 4), "holds no MSSA, ISTA or OvercompleteISTA"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tensor_parallel(module, mesh)
    # The last layer does not fit: the first must not be split then.
    model = nn.Sequential(CrateBlock(8, ranks, 4), CrateBlock(8, ranks + 1, 4))
    with pytest.raises(ValueError, match=r"^1\.mssa: "):
        tensor_parallel(model, mesh)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    model = tensor_parallel(CrateBlock(8, ranks, 4), mesh)
    with pytest.raises(ValueError, match="sharded already"):
        tensor_parallel(model, mesh)


def the_styles_serve_a_plan_of_torch(mesh):
    reference = build("crate").blocks[0]
    block = copy.deepcopy(reference)
    parallelize_module(block, mesh, {"mssa": MSSAParallel(), "ista": ISTAParallel()})
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_equal(block(x), reference(x))
    assert isinstance(block.ista.weight, DTensor)


def everything_on_four_ranks():
    # One start of the processes for all checks, because the start takes longer than the checks.
    equals_one_device(init_device_mesh("cpu", (4,)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    with pytest.raises(ValueError, match="expected one dimension"):
        tensor_parallel(build("crate"), mesh)
    data, tensor = mesh["data"], mesh["tensor"]
    for check in (
        equals_one_device,
        a_step_equals_one_device,
        sends_what_the_guide_says,
        drops_the_same_everywhere,
        generates_the_same,
        the_styles_serve_a_plan_of_torch,
        asks_for_whole_weights,
        refuses,
    ):
        check(tensor)

    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=data)
        return fully_shard(model, mesh=data)

    half = slice(2 * data.get_local_rank(), 2 * data.get_local_rank() + 2)
    a_step_equals_one_device(tensor, shard, half, parts=2)


def test_equals_one_device_on_four_ranks_two_ranks_and_two_by_two():
    run_on_ranks(4, everything_on_four_ranks)
