"""The error budget: which errors it accepts, and which it refuses."""

import torch

from crate_kernels import agreement


def test_the_number_and_shapes_of_tensors_must_agree():
    one = [torch.ones(2, 2)]
    assert agreement.judge(one, [t.double() for t in one], one, torch.float32, kinks=False).passed
    assert not agreement.judge(one * 2, [t.double() for t in one], one, torch.float32, kinks=False).passed
    assert not agreement.judge([one[0][:1]], [t.double() for t in one], one, torch.float32, kinks=False).passed


def test_gradients_of_a_model_are_judged_together():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(40)]

    def off(by, of=exact):
        return [t * (1 + by * torch.randn(50, generator=generator)) for t in of]

    reference, good = off(1e-7), off(1e-7)
    reference[7] = exact[7].clone()  # an element with no reference error, whose budget is one rounding
    good[7] = off(1e-6, exact[7:8])[0]
    judged = dict(dtype=torch.float32, kinks=False)
    assert not agreement.judge(good, exact, reference, **judged).passed
    assert agreement.judge(good, exact, reference, together=True, **judged).passed
    for wrong in (exact[7] * 1.01, -exact[7], exact[7] * float("nan")):
        assert not agreement.judge([*good[:7], wrong, *good[8:]], exact, reference, together=True, **judged).passed


def test_twice_the_error_of_the_reference_and_one_rounding_is_granted():
    exact = torch.ones(10, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps

    def share(error, own):
        return agreement.judge([exact + error], [exact], [exact + own], torch.bfloat16, kinks=False).share

    assert share(eps, 0.0) == 1
    assert share(5 * eps, 2 * eps) == 1
    assert share(1.01 * eps, 0.0) > 1
    assert share(float("nan"), eps) == float("inf")
    assert share(1.0, float("inf")) == 0  # the reference overflows, so there is nothing to compare


def test_a_flipped_relu_unit_is_granted_and_nothing_else():
    """A unit close to its threshold may switch, and changes the gradient by its whole share at any precision."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    before = x @ torch.randn(50, generator=generator, dtype=torch.float64)
    before[0] = 0

    def step(shift, scale=1.0):
        units = before + shift
        return [units.relu(), scale * ((units > 0)[:, None] * x).sum(0)]

    exact, flipped, wrong = step(0), step(1e-6), step(0, 1.2)
    judged = dict(dtype=torch.bfloat16)
    assert not agreement.judge(flipped, exact, exact, **judged, kinks=False).passed
    assert agreement.judge(flipped, exact, exact, **judged, kinks=True).passed
    assert not agreement.judge(wrong, exact, exact, **judged, kinks=True).passed
