"""Coding rate, subspace coding rate and sparsity against their reference definitions."""

import pytest
import torch

from crate_kernels.analysis import coding_rate, effective_rank, sparsity, subspace_coding_rate, subspace_coherence


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("tokens", "width"), [(5, 30), (30, 5), (1, 8), (8, 1), (16, 16)])
def test_coding_rate(tokens, width):
    z = normal(2, 3, tokens, width)
    identity = torch.eye(tokens, dtype=torch.float64)
    reference = 0.5 * torch.logdet(identity + width / (tokens * 0.3**2) * z @ z.mT)
    torch.testing.assert_close(coding_rate(z, eps=0.3), reference)


@pytest.mark.parametrize(("tokens", "width"), [(50, 8), (6, 16)])
def test_subspace_coding_rate_follows_the_published_measurement(tokens, width):
    w = 7 * normal(3, 4, tokens, width)
    w[0, 0, 0] = 0  # a token of length zero stays zero
    unit = w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    per_head = 0.5 * torch.logdet(torch.eye(tokens, dtype=torch.float64) + width / (tokens * 0.01) * unit @ unit.mT)
    torch.testing.assert_close(subspace_coding_rate(w), per_head.sum(dim=1))


def test_a_rank_one_head_has_a_rate_known_in_closed_form():
    direction = torch.nn.functional.normalize(normal(8), dim=0)
    w = (direction * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0]).double()[:, None])[None, None]
    torch.testing.assert_close(subspace_coding_rate(w), torch.tensor([0.5]).double() * torch.log1p(torch.tensor(800.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_measured_in_float64(dtype):
    z = (30 * normal(2, 64, 16)).to(dtype)
    measured = coding_rate(z, eps=1e-3)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, coding_rate(z.double(), eps=1e-3).float())


def test_the_rate_falls_when_tokens_gather():
    z = normal(1, 2, 40, 8)
    gathered = z.mean(dim=2, keepdim=True) + 0.1 * z
    assert (subspace_coding_rate(gathered + 3) < subspace_coding_rate(z)).all()


def test_coding_rate_is_differentiable():
    z = normal(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: coding_rate(t, eps=0.5), z)


def test_sparsity_is_the_non_zero_fraction_per_sample():
    z = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[2.0, -1.0], [0.0, 3.0]]])
    assert sparsity(z).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coding_rate(torch.ones(3)), r"z: expected a floating tensor \(\.\.\., N, d\), got \(3,\)"),
        (lambda: coding_rate(torch.ones(3, 3), eps=0), "eps: expected a positive number, got 0"),
        (lambda: subspace_coding_rate(torch.ones(3, 3)), r"w: expected a floating tensor \(B, H, N, p\)"),
        (lambda: effective_rank(torch.ones(3)), r"z: expected a floating tensor \(\.\.\., N, d\), got \(3,\)"),
        (lambda: subspace_coherence(torch.ones(3), 1), r"weight: expected a floating tensor \(H·p, d\)"),
        (lambda: subspace_coherence(torch.ones(6, 4), 4), "heads: 4 heads do not split weight"),
        (lambda: sparsity(torch.ones(3)), r"z: expected a tensor \(B, \.\.\.\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_effective_rank():
    basis = torch.linalg.qr(normal(9, 5)).Q.T  # five orthonormal rows of width 9
    torch.testing.assert_close(effective_rank(basis), torch.tensor(5.0, dtype=torch.float64))
    line = normal(7, 1) * basis[0]
    torch.testing.assert_close(effective_rank(line), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    z = normal(2, 20, 6)
    singular = torch.linalg.svdvals(z)
    share = singular / singular.sum(-1, keepdim=True)
    torch.testing.assert_close(effective_rank(z), (-(share * share.log()).sum(-1)).exp())
    torch.testing.assert_close(effective_rank(z.mT), effective_rank(z))
    assert effective_rank(torch.zeros(3, 4)) == 1


def test_subspace_coherence():
    basis = torch.linalg.qr(normal(12, 12)).Q
    # Heads of width 4: two orthogonal ones, and a third that shares two directions with the first, in another basis.
    mixed = normal(4, 4) @ torch.cat([basis[:2], basis[8:10]])
    coherence = subspace_coherence(torch.cat([basis[:4], 5 * basis[4:8], mixed]), 3)
    expected = torch.tensor([[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(coherence, expected)


def test_random_subspaces_have_the_coherence_of_chance():
    coherence = subspace_coherence(normal(4 * 16, 128), 4)
    others = coherence[~torch.eye(4, dtype=torch.bool)]
    assert others.mean().item() == pytest.approx(16 / 128, rel=0.15)
