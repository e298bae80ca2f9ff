"""What is learnt, beside diffusers' own schedulers and the formulas of the papers in float64."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from lorakit.errors import BaseError
from lorakit.images.noise import NoiseModel, generator_of

X = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(3))


def noise_of(*key):
    """What ``apply`` draws behind the time, where the time is given."""
    return torch.randn(X.shape, generator=generator_of(*key))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_against_ddpm(prediction, kind):
    settings = {"prediction_type": prediction, "beta_schedule": "scaled_linear"}
    model = NoiseModel(getattr(diffusers, kind)(**settings))
    oracle = diffusers.DDPMScheduler(**settings)
    for place in (0.0, 0.3, 0.999):
        step = torch.tensor([int(place * 1000)])
        found = model.apply(X, generator_of("a", 1), place)
        noise = noise_of("a", 1)
        assert found.time == step.item()
        torch.testing.assert_close(found.input, oracle.add_noise(X[None], noise[None], step)[0])
        target = {
            "epsilon": noise,
            "v_prediction": oracle.get_velocity(X[None], noise[None], step)[0],
            "sample": X,
        }[prediction]
        torch.testing.assert_close(found.target, target)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_against_flow_matching(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    model = NoiseModel(scheduler)
    for place in (0.0, 0.25, 0.999):
        found = model.apply(X, generator_of("b"), place)
        time = scheduler.timesteps[int(place * 1000)]
        assert found.time == pytest.approx(time.item(), rel=1e-6)
        expected = scheduler.scale_noise(X[None], time[None], noise_of("b")[None])[0]
        torch.testing.assert_close(found.input, expected)
        torch.testing.assert_close(found.target, noise_of("b") - X)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr(prediction):
    """The weights of the paper's section 3.4, over diffusers' SNR."""
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction)
    model = NoiseModel(scheduler, min_snr=5.0)
    for place in (0.01, 0.2, 0.9):
        snr = compute_snr(scheduler, torch.tensor([int(place * 1000)])).double().item()
        least = min(snr, 5.0)
        expected = {
            "epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least
        }[prediction]  # fmt: skip
        found = model.apply(X, generator_of(0), place).weight
        assert found == pytest.approx(expected, rel=1e-4)  # diffusers' SNR is float32


def test_noise_offset_moves_whole_channels():
    scheduler = diffusers.DDIMScheduler()
    plain = NoiseModel(scheduler).apply(X, generator_of(1), 0.5).target
    moved = NoiseModel(scheduler, offset=0.5).apply(X, generator_of(1), 0.5).target
    difference = moved - plain
    assert difference.std(dim=(1, 2)).max() < 1e-6
    assert difference.mean(dim=(1, 2)).std() > 0.05


def test_what_is_random_is_a_function_of_its_key():
    model = NoiseModel(diffusers.DDIMScheduler())
    first, again, other = (model.apply(X, generator_of(k)) for k in (1, 1, 2))
    assert torch.equal(first.input, again.input)
    assert not torch.equal(first.input, other.input)
    times = [model.apply(X, generator_of("t", k)).time for k in range(400)]
    assert 440 < sum(times) / len(times) < 560  # uniform over 1000, σ of the mean is 14
    flow = NoiseModel(diffusers.FlowMatchEulerDiscreteScheduler())
    times = torch.tensor([flow.apply(X, generator_of("t", k)).time for k in range(400)]) / 1000
    logits = torch.logit(times.clamp(1e-3, 1 - 1e-3))
    assert abs(logits.mean()) < 0.2
    assert 0.85 < logits.std() < 1.15


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("EDMEulerScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
    ],
)
def test_an_unknown_scheduler(kind, settings):
    """EDM says that it predicts ε, of an input of its own; other flows say nothing."""
    with pytest.raises(BaseError, match=f"a {kind} that predicts"):
        NoiseModel(getattr(diffusers, kind)(**settings))
