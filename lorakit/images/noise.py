"""What a picture model learns: noise of a known strength is mixed in, and it tells what was.

=========== ===================================== =============================================
model       what it sees of a latent ``x``        what it predicts (its target)
=========== ===================================== =============================================
``epsilon`` √ᾱₜ x + √(1−ᾱₜ) ε                     ε (Ho et al., arXiv 2006.11239)
``v``       the same                              √ᾱₜ ε − √(1−ᾱₜ) x (Salimans & Ho, 2202.00512)
``sample``  the same                              x
``flow``    (1−σ) x + σ ε                         ε − x (Lipman et al., 2210.02747)
=========== ===================================== =============================================

The schedules (ᾱₜ; the shift of σ), and how time is drawn for flows, are diffusers' own. Everything
random is drawn from a generator that belongs to one example of one step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.errors import BaseError
from lorakit.optional import require

Prediction = Literal["epsilon", "v", "sample", "flow"]
_KINDS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}

#: SD3's way to draw time, most of it in the middle (Esser et al., arXiv 2403.03206)
_LOGIT_NORMAL = {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}


@dataclass(frozen=True)
class Noised:
    """A latent as the model sees it."""

    input: Tensor
    """[C, H, W]."""
    target: Tensor
    """[C, H, W]."""
    time: float
    """What the model is told: a step of the schedule; of flows, 1000 · σ."""
    weight: float
    """Of this example's loss."""


class NoiseModel:
    """How one base mixes noise in.

    Args:
        scheduler: the pipeline's own.
        min_snr: γ of min-SNR weighting (Hang et al., arXiv 2303.09556); ``None``: none.
        offset: standard deviation of what is added to a whole channel's noise, by which very dark
            and very bright pictures are learnt (Guttenberg, 2023).

    Raises:
        BaseError: a scheduler that no loss is known for.
    """

    def __init__(
        self, scheduler: Any, *, min_snr: float | None = None, offset: float = 0.0
    ) -> None:
        diffusers = require("diffusers", extra="images", purpose="training on pictures")
        self._min_snr, self._offset = min_snr, offset
        self.prediction: Prediction
        if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            self.prediction = "flow"
            self._schedule = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
            self._sigmas = self._schedule.sigmas.double().cpu()
            self.num_steps = int(self._schedule.config.num_train_timesteps)
            return
        told = scheduler.config.get("prediction_type", "epsilon")
        # EDM's schedulers, and those of other flows, have no betas: ᾱ of the default ones is not
        # what such a model was trained on
        if told not in _KINDS or "beta_schedule" not in scheduler.config:
            raise BaseError(
                f"the pipeline's scheduler is a {type(scheduler).__name__} that predicts {told!r}; "
                f"known are {', '.join(_KINDS)} over a schedule of betas, and flows of "
                "FlowMatchEulerDiscreteScheduler"
            )
        self.prediction = _KINDS[told]
        wanted = set(diffusers.DDPMScheduler().config)
        settings = {k: v for k, v in scheduler.config.items() if k in wanted}
        self._schedule = diffusers.DDPMScheduler.from_config(settings)
        self._kept = self._schedule.alphas_cumprod.double().cpu()  # ᾱ, [T]
        self.num_steps = len(self._kept)

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow"

    def apply(
        self, latent: Tensor, generator: torch.Generator, place: float | None = None
    ) -> Noised:
        """Mix noise into a latent.

        Args:
            latent: [C, H, W], on the CPU; scaled as the model knows it.
            generator: every random number comes from it.
            place: where in time, in [0, 1); ``None``: it is drawn.
        """
        if self.is_flow:
            return self._flow(latent, generator, place)
        if place is None:
            step = int(torch.randint(self.num_steps, (1,), generator=generator))
        else:
            step = int(place * self.num_steps)
        noise = _like(latent, generator)
        if self._offset:
            noise = noise + self._offset * torch.randn(len(latent), 1, 1, generator=generator)
        keep = float(self._kept[step])
        signal, rest = keep**0.5, (1 - keep) ** 0.5
        target = noise if self.prediction == "epsilon" else latent
        if self.prediction == "v":
            target = signal * noise - rest * latent
        return Noised(signal * latent + rest * noise, target, float(step), self._weight(keep))

    def _flow(self, latent: Tensor, generator: torch.Generator, place: float | None) -> Noised:
        if place is None:
            training = require("diffusers.training_utils", extra="images")
            drawn = training.compute_density_for_timestep_sampling(
                batch_size=1, generator=generator, **_LOGIT_NORMAL
            )
            place = float(drawn)
        noise = _like(latent, generator)
        sigma = float(self._sigmas[min(int(place * self.num_steps), self.num_steps - 1)])
        mixed = (1 - sigma) * latent + sigma * noise
        return Noised(mixed, noise - latent, sigma * self.num_steps, 1.0)

    def _weight(self, keep: float) -> float:
        """min(SNR, γ) over what makes a loss on x of the model's own, of the same paper."""
        if self._min_snr is None:
            return 1.0
        snr = keep / max(1 - keep, 1e-12)
        least = min(snr, self._min_snr)
        if self.prediction == "sample":
            return least
        # where nothing of the picture is left (zero terminal SNR), noise alone says nothing of it
        return least / (snr + 1) if self.prediction == "v" else least / max(snr, 1e-12)

    def facts(self) -> Mapping[str, Any]:
        """For run.yaml and the report."""
        return {"prediction": self.prediction, "num_steps": self.num_steps}


def _like(latent: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(latent.shape, generator=generator, dtype=latent.dtype)


def generator_of(*key: int | str) -> torch.Generator:
    """A generator that is a function of its key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
