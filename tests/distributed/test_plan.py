"""Each formula of ``crate-kernels plan`` against torch's own meters."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from crate_kernels import cli, use_backend
from crate_kernels.distributed import plan, sharding
from crate_kernels.models import CRATE, CrateGPT

from .ranks import run_on_ranks

VISION = dict(image_size=32, patch_size=8, num_classes=10, dim=48, depth=3, heads=2, dim_head=16)
MODELS = {
    "class token": lambda: CRATE(**VISION),
    "mean of tokens": lambda: CRATE(**VISION, pool="mean"),
    "language": lambda: CrateGPT(block_size=24, vocab_size=100, n_layer=3, n_head=2, n_embd=32),
}


def batch(model, samples):
    if isinstance(model, CrateGPT):
        return torch.randint(model.vocab_size, (2, samples, model.block_size)).unbind()
    return (torch.randn(samples, 3, 32, 32),)


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def saved_bytes(model, inputs, precision):
    """Bytes that the autograd graph of a forward pass holds: each storage once, without those of parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, use_backend("eager"), autocast(precision):
        model(*inputs)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_saved_for_backward_are_those_of_the_autograd_graph(name, precision):
    model = MODELS[name]()
    predicted = plan.saved_for_backward(model, plan.Compute.of(precision), plan.sample_tokens(model))
    for samples in (2, 5):
        assert saved_bytes(model, batch(model, samples), precision) == predicted.at(samples)


def peak(step):
    """The largest memory of ``step`` in addition to what was allocated before, as torch's profiler counts it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def training_step(model, inputs, precision, optimizer=None):
    with use_backend("eager"), autocast(precision):
        out = model(*inputs)
        loss = out[1] if isinstance(out, tuple) else out.float().square().mean()
    del out
    loss.backward()


def bounds(name, precision, checkpointing, samples=8):
    """For one training step: the predicted bytes of saved tensors, and the prediction with gradients and working
    memory."""
    if name == "language":
        model = CrateGPT(block_size=64, vocab_size=200, n_layer=4, n_head=4, n_embd=128)
    else:
        model = CRATE(image_size=32, patch_size=4, num_classes=10, dim=128, depth=4, heads=4, dim_head=32)
    found = plan.memory(model, "ddp", 1, plan.Compute.of(precision), checkpointing)
    if checkpointing:
        sharding.checkpoint_activations(model)
    inputs = batch(model, samples)
    training_step(model, inputs, precision)
    model.zero_grad(set_to_none=True)
    measured = peak(lambda: training_step(model, inputs, precision))
    saved = found.saved.at(samples)
    return saved, measured, saved + found.gradients + found.working.at(samples)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vision", "language"])
def test_the_peak_of_a_step_lies_below_the_predicted_sum_and_not_far(name, precision, checkpointing):
    _, measured, predicted = bounds(name, precision, checkpointing)
    assert 0.5 * predicted <= measured <= predicted


WHOLE = {"_allgather_base_": ("all_gather", 0), "_reduce_scatter_base_": ("reduce_scatter", 1)}
"""Operator of torch -> name of the collective, and position of the argument that is the whole tensor."""


class Counter(TorchDispatchMode):
    """Bytes of the whole tensors that the collectives move."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.partition("::")
        if name[0] == "c10d" and name[2] in WHOLE:
            kind, whole = WHOLE[name[2]]
            self.bytes[kind] = self.bytes.get(kind, 0) + arguments[whole].nbytes
        return function(*arguments, **(keywords or {}))


def on_four_ranks_and_fewer(folder):
    """The same processes form groups of 4, 3, 2 and 1 ranks, one after the other."""
    rank = dist.get_rank()
    for ranks, precision in ((4, "fp32"), (3, "bf16"), (2, "fp32"), (1, "bf16")):
        if rank >= ranks:
            return
        if ranks < dist.get_world_size():
            dist.destroy_process_group()
            dist.init_process_group("gloo", f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
        compare_with_torch(ranks, precision)


def compare_with_torch(ranks, precision):
    torch.manual_seed(0)
    for name, build in MODELS.items():
        compute = plan.Compute.of(precision)
        model = build()
        model.register_parameter("unused", torch.nn.Parameter(torch.zeros(5, 7), requires_grad=False))
        inputs = batch(model, 4)
        found = plan.memory(model, "fsdp", ranks, compute)
        expected = {c.name: c.bytes for c in plan.collectives(model, "fsdp", ranks, accumulate=2)}
        sharding.shard([model], torch.device("cpu"))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        with Counter() as counter:
            for _ in range(2):
                training_step(model, inputs, precision)
        assert counter.bytes == expected, name
        local = [p.to_local().untyped_storage().nbytes() for p in model.parameters() if isinstance(p, DTensor)]
        assert sum(local) == found.parameters
        if dist.get_rank() == 0:  # the states of AdamW have no padding; rank 0 has the largest shard
            gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
            assert sum(gradient.nbytes for gradient in gradients) == found.gradients
            optimizer.step()
            states = [value for state in optimizer.state.values() for value in state.values()]
            local = [value.to_local() if isinstance(value, DTensor) else value for value in states]
            assert sum(value.nbytes for value in local) == found.optimizer
        optimizer.zero_grad(set_to_none=True)
        measured = peak(lambda i=inputs, m=model: training_step(m, i, precision))
        transient = found.at(4) - found.parameters - found.optimizer
        assert 0.4 * transient <= measured <= transient, (name, measured, transient)

        if ranks == 1:  # a run of one rank makes no copies
            assert plan.collectives(model, "ddp", 1) == []
            continue
        model, sent = build(), []
        copied = sharding.copy_to_ranks(model, torch.device("cpu"))

        def count(_, bucket, sent=sent):
            sent.append(bucket.buffer().nbytes)
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

        copied.register_comm_hook(None, count)
        training_step(copied, inputs, precision)
        (collective,) = plan.collectives(model, "ddp", ranks)
        assert sum(sent) == collective.bytes == plan.memory(model, "ddp", ranks, compute).communication


@pytest.mark.slow
def test_shards_and_collectives_are_those_that_torch_makes(tmp_path):
    run_on_ranks(4, on_four_ranks_and_fewer, tmp_path)


def test_one_rank_exchanges_nothing_and_splits_nothing():
    model = MODELS["class token"]()
    assert plan.collectives(model, "fsdp", 1) == plan.collectives(model, "ddp", 1) == []
    found = plan.memory(model, "fsdp", 1, plan.Compute())
    assert found.parameters == found.gradients == 4 * sum(p.numel() for p in model.parameters())
    assert found.communication == 0


def test_the_largest_batch_fits_and_one_more_does_not():
    model = MODELS["language"]()
    found = plan.memory(model, "ddp", 4, plan.Compute(2))
    most = found.largest_batch(1e8)
    assert found.at(most) <= 1e8 < found.at(most + 1)
    assert found.largest_batch(1) == 0


def test_the_command_prints_a_prediction(capsys):
    options = "plan --model crate_large --gpus 64 --parallel fsdp --batch 1024 --precision bf16"
    assert cli.main(options.split()) == 0
    said = capsys.readouterr().out
    settings = plan.PlanOptions(model="crate_large", gpus=64, batch_size=1024)
    found = plan.memory(settings.build(), "fsdp", 64, plan.Compute.of("bf16"))
    assert said.startswith("PREDICTION from formulas, not a measurement: crate_large, 77,641,192 parameters")
    assert f"sum                       {found.at(16) / 1e9:>10.3f}" in said
    assert f"batch 1,024 fits: {found.at(16) / 1e9:.1f} GB a rank, of 72.0 GB" in said
    assert f"({found.largest_batch(72e9):,} a rank)" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "batch 1,024 does not fit: 513.9 GB a rank, of 72.0 GB (80 GB less 10 % in reserve).\n"
             "The largest batch that fits is 136 (17 a rank)."),
        ("--memory 1", "GB a rank, of 0.9 GB (1 GB less 10 % in reserve).\nNot one sample a rank fits."),
    ],
)  # fmt: skip
def test_the_command_says_that_a_run_does_not_fit(options, message, capsys):
    assert cli.main(["plan", "--context", "5000", "--model", "crate_gpt2_base", *options.split()]) == 0
    assert message in capsys.readouterr().out


def test_the_command_names_the_option_whose_size_the_patches_do_not_divide(capsys):
    assert cli.main(["plan", "--image-size", "225"]) == 2
    assert "--image-size must be a multiple of the patch size 16 x 16, got 225" in capsys.readouterr().err


def scale_table():
    """The table of docs/scale.md."""
    lines = [
        "| ranks | | texts a rank | parameters, gradients, AdamW | buffers | saved and working | sum | largest batch "
        "of a rank in 80 GB | a rank sends |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (8, 64, 256, 1024):
        for parallel in ("ddp", "fsdp"):
            settings = plan.PlanOptions(model="crate_gpt2_xl", gpus=ranks)
            model, texts = settings.build(), settings.batch_size // ranks
            found = plan.memory(model, parallel, ranks, plan.Compute.of("bf16"), checkpointing=True)
            states = found.parameters + found.gradients + found.optimizer
            sizes = [states, found.communication, found.saved.at(texts) + found.working.at(texts), found.at(texts)]
            sent = sum(c.sent(ranks) for c in plan.collectives(model, parallel, ranks))
            cells = [f"{size / 1e9:.2f} GB" for size in sizes] + [
                f"{found.largest_batch(72e9)}",
                f"{sent / 1e9:.2f} GB",
            ]
            lines.append(f"| {ranks:,} | `{parallel}` | {texts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_the_guide_is_what_the_formulas_say():
    assert scale_table() in (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
