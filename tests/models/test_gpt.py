import pytest
import torch

from crate_kernels import use_backend
from crate_kernels.models import CheckpointError, CrateGPT, CrateGPTConfig, crate_gpt2, create_model, load_model

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=8)
VARIANTS = pytest.mark.parametrize("overcomplete", [False, True], ids=["base", "overcomplete"])


def small(overcomplete=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return CrateGPT(CrateGPTConfig(**SMALL | options, overcomplete=overcomplete)).to(dtype)


def tokens(batch=3, length=11, seed=1):
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "count"), [("crate_gpt2_base", 60_699_648), ("crate_lm_base", 81_934_848)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_larger_sizes_build():
    with torch.device("meta"):
        model = crate_gpt2("xl", block_size=64)
    assert len(model.blocks) == 48
    assert model.position_embedding.weight.shape == (64, 1600)
    with pytest.raises(ValueError, match="known are base, medium, large, xl"):
        crate_gpt2("huge")


@VARIANTS
def test_initialization(overcomplete):
    model = small(overcomplete, dtype=torch.float32, n_embd=256, n_layer=2, vocab_size=300)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    block = model.blocks[1]
    assert block.mssa.projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mssa.output.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not block.mssa.output.bias.any()
    # Kaiming-uniform: bound sqrt(6 / fan), the fan being the width of the tokens in the public orientation.
    dictionary = block.ista.D if overcomplete else block.ista.weight
    assert dictionary.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.01)


def reference_logits(model, idx):
    """The forward pass of the public description, written out with the public keys."""
    state, layers = model.upstream_state_dict(), model.config["n_layer"]
    heads, width = model.config["n_head"], model.config["n_embd"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][: idx.shape[1]]
    for i in range(layers):
        h = f"transformer.h.{i}"
        w = norm(x, f"{h}.prenorm_1") @ state[f"{h}.attn.c_attn.weight"].T
        w = w.unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = w @ w.transpose(-1, -2) * (width // heads) ** -0.5
        scores = scores.masked_fill(torch.ones(idx.shape[1], idx.shape[1]).triu(1).bool(), -torch.inf)
        o = (scores.softmax(-1) @ w).transpose(1, 2).flatten(2)
        x = x + o @ state[f"{h}.attn.c_proj.weight"].T + state[f"{h}.attn.c_proj.bias"]
        x, weight = norm(x, f"{h}.prenorm_2"), state[f"{h}.ista.weight"]
        if model.config["overcomplete"]:
            first = torch.relu(0.1 * (x @ weight.T) - 0.01)
            second = torch.relu(first + 0.1 * (x @ weight.T - first @ weight @ weight.T) - 0.01)
            x = second @ weight
        else:
            x = torch.relu(x + 0.1 * (x @ weight - x @ weight.T @ weight) - 0.01)
    if model.config["overcomplete"]:
        x = norm(x, "transformer.ln_f")
    return x @ state["lm_head.weight"].T


@VARIANTS
def test_forward_is_the_public_architecture(overcomplete):
    model, idx = small(overcomplete), tokens()
    targets = tokens(seed=2)
    targets[0, :4] = -1
    logits, loss = model(idx, targets)
    wanted = reference_logits(model, idx)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
    asked = targets != -1
    torch.testing.assert_close(loss, -wanted.log_softmax(-1)[asked].gather(1, targets[asked][:, None]).mean())
    last, none = model(idx)
    assert none is None
    torch.testing.assert_close(last, wanted[:, -1:], rtol=0, atol=1e-12)


@VARIANTS
def test_reference_and_eager_agree(overcomplete):
    model, idx, targets = small(overcomplete), tokens(), tokens(seed=2)
    results = {}
    for backend in ("reference", "eager"):
        model.zero_grad()
        with use_backend(backend):
            logits, loss = model(idx, targets)
        loss.backward()
        results[backend] = [logits, loss, *(p.grad.clone() for p in model.parameters())]
    assert all(g.abs().max() > 0 for g in results["eager"])
    torch.testing.assert_close(results["eager"], results["reference"], rtol=0, atol=1e-10)


def test_tokens_see_only_those_before_them():
    model, idx = small(), tokens()
    changed = idx.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 23
    before, after = (model.forward_features(i) for i in (idx, changed))
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


@VARIANTS
def test_public_layout_goes_in_and_out_bit_for_bit(overcomplete):
    model = small(overcomplete, dtype=torch.float32)
    public = {key: value.clone() for key, value in model.upstream_state_dict().items()}
    expected = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    for i in range(2):
        names = ["prenorm_1.weight", "prenorm_1.bias", "attn.c_attn.weight", "attn.c_proj.weight", "attn.c_proj.bias"]
        names += ["prenorm_2.weight", "prenorm_2.bias", "ista.weight"]
        expected |= {f"transformer.h.{i}.{name}" for name in names}
    if overcomplete:
        expected |= {"transformer.ln_f.weight", "transformer.ln_f.bias"}
        assert public["transformer.h.0.ista.weight"].shape == (32, 8)
    else:  # the public class keeps its causal masks as buffers, and wants them back
        expected |= {f"transformer.h.{i}.attn.bias" for i in range(2)}
        assert torch.equal(public["transformer.h.1.attn.bias"], torch.ones(16, 16).tril()[None, None])
    assert set(public) == expected

    compiled = {f"_orig_mod.{key}": value for key, value in public.items()}
    other = small(overcomplete, dtype=torch.float32)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(compiled)
    exported = other.upstream_state_dict()
    assert list(exported) == list(public)
    assert all(torch.equal(exported[key], value) for key, value in public.items())
    torch.testing.assert_close(other(tokens())[0], model(tokens())[0], rtol=0, atol=0)


def test_layout_is_strict():
    model = small(dtype=torch.float32)
    public = model.upstream_state_dict()
    with pytest.raises(CheckpointError, match=r"missing keys.*transformer\.h\.1\.ista\.weight"):
        model.load_state_dict({k: v for k, v in public.items() if k != "transformer.h.1.ista.weight"})
    with pytest.raises(CheckpointError, match=r"unexpected keys.*transformer\.h\.0\.attn\.c_extra"):
        model.load_state_dict(public | {"transformer.h.0.attn.c_extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"shapes that differ.*transformer\.h\.0\.ista\.weight"):
        model.load_state_dict(small(overcomplete=True, dtype=torch.float32).upstream_state_dict(), strict=False)
    with pytest.raises(CheckpointError, match="differ, but this architecture ties them"):
        model.load_state_dict(public | {"lm_head.weight": torch.zeros(23, 8)})
    head_alone = {k: v for k, v in public.items() if k != "transformer.wte.weight"}
    assert model.load_state_dict(head_alone).missing_keys == []


@VARIANTS
def test_save_and_load(tmp_path, overcomplete):
    model = small(overcomplete, dtype=torch.float32)
    model.save(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(tokens())[0], model(tokens())[0], rtol=0, atol=0)


def test_one_head_still_has_an_output_projection():
    model = small(n_head=1)
    assert model.blocks[0].mssa.output.weight.shape == (8, 8)
    torch.testing.assert_close(model(tokens(), tokens())[0], reference_logits(model, tokens()), rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only():
    model, idx = small(dropout=0.5), tokens()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (torch.zeros(1, 17, dtype=torch.long), "17 tokens, but block_size is 16"),
        (torch.zeros(1, 0, dtype=torch.long), "N at least 1"),
        (torch.zeros(3, dtype=torch.long), r"shape \(B, N\)"),
        (torch.zeros(1, 3), "expected integers"),
        (torch.tensor([[0, 23]]), r"idx: values must lie in 0\.\.22 \(the last token of the vocabulary\), got 0\.\.23"),
        (torch.tensor([[-1]]), r"idx: values must lie in 0\.\.22"),
    ],
)
def test_errors_say_what_does_not_fit(idx, message):
    with pytest.raises(ValueError, match=message):
        small()(idx)
    with pytest.raises(ValueError, match="n_head: 3 does not divide"):
        CrateGPT(n_head=3, n_embd=8)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), r"targets: expected shape \(2, 6\), got \(2, 5\)"),
        (torch.zeros(12, dtype=torch.long), r"targets: expected shape \(2, 6\), got \(12,\)"),
        (torch.zeros(2, 6, dtype=torch.int32), r"targets: dtype torch\.int32 is not supported"),
        (torch.full((2, 6), -100), r"targets: values must lie in -1\.\.22 \(the last class; -1 is ignored\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_name(targets, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small()(torch.zeros(2, 6, dtype=torch.long), targets)


@VARIANTS
def test_exports(overcomplete):
    model, idx = small(overcomplete).eval(), tokens(batch=2)
    length = torch.export.Dim("length", min=2, max=16)
    with use_backend("eager"):
        program = torch.export.export(model, (idx,), dynamic_shapes={"idx": {1: length}})
    other = tokens(batch=2, length=7)
    torch.testing.assert_close(program.module()(other)[0], model(other)[0], rtol=0, atol=0)


def test_fits_a_sequence():
    model = small(dtype=torch.float32)
    idx = tokens(batch=2, length=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(23.0).log().item(), rel=0.1)
    assert losses[-1] < 0.3
