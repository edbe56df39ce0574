"""Noise levels: the maps between t, sigma and log-SNR, and the five ways in which a network can be asked for x0.

The coordinate everywhere is x = x0 + sigma * n with n ~ N(0, 1) (Karras et al. 2022, arXiv:2206.00364). A
variance-preserving x_vp = sqrt(abar) x0 + sqrt(1 - abar) n is x / sqrt(1 + sigma^2) with sigma = sqrt(1 / abar - 1),
and a flow's x_f = (1 - s) x0 + s n is x / (1 + sigma) with sigma = s / (1 - s).
Shape letters: B batch, T number of timesteps.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .errors import InputError
from .untrusted import Field, checked

__all__ = ["NoiseSchedule", "Scaling", "match_shape"]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TABLE_PREDICTIONS = ("epsilon", "sample", "v_prediction")
ZERO_SNR_ABAR = 2.0**-24  # the last abar of a zero-SNR table, as diffusers has it: sigma stays finite (4096)

# What diffusers assumes for a key that is missing or null, by scheduler class (their names end in "Scheduler").
_WIDE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "linspace"}
_NARROW = _WIDE | {"beta_start": 0.00085, "beta_end": 0.012}
_LATENT = _NARROW | {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
_EDM: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"}
_FLOW = {"shift": 1.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DDIM DDIMInverse DDIMParallel DDPM DDPMParallel PNDM", _WIDE | {"timestep_spacing": "leading"}),
    ("LMSDiscrete EulerDiscrete EulerAncestralDiscrete DPMSolverSinglestep", _WIDE),
    ("DPMSolverMultistep DEISMultistep UniPCMultistep", _WIDE | {"flow_shift": 1.0}),
    ("HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverSDE", _NARROW),
    ("LCM TCD", _LATENT),
    ("EDMEuler EDMDPMSolverMultistep", _EDM),
    ("FlowMatchEulerDiscrete", _FLOW),
)
_WORDS = ("karras", "exponential", "beta", "lu")  # of the spacings that a flag asks for
_FLAGS = ("rescale_betas_zero_snr", "thresholding", "invert_sigmas", "use_dynamic_shifting", "use_flow_sigmas")
FIELDS = {
    **dict.fromkeys((*_FLAGS, *(f"use_{word}_sigmas" for word in _WORDS)), Field(bool)),
    **dict.fromkeys(("beta_start", "beta_end"), Field(float, 1e-12, 1 - 1e-12)),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "shift", "flow_shift"), Field(float, 1e-9, 1e9)),
    **dict.fromkeys(("timestep_spacing", "sigma_schedule", "timestep_type", "variance_type"), Field(str)),
    "num_train_timesteps": Field(int, 2, 1e6), "steps_offset": Field(int, 0, 1e6), "rho": Field(float, 1, 1e3),
    "trained_betas": Field(float, 0, 1, listed=True),
}  # fmt: skip
CLASSES = {f"{name}Scheduler": defaults for names, defaults in _GROUPS for name in names.split()}


class Scaling(NamedTuple):
    """denoised = c_skip * x + c_out * network(c_in * x, c_noise); float64, each of sigma's shape."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_noise: Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels of a model and what its network predicts; immutable, float64, on the CPU.

    Made by the class methods below. `prediction_type` is one of epsilon, sample, v_prediction (a table of T betas),
    flow_prediction (rectified flow), edm and edm_v (EDM's preconditioning, and the same with the output's sign turned).
    `spacing` is where the config wants sampling steps: leading, trailing, linspace, karras, exponential or flow.
    """

    config: Mapping[str, Any]
    num_train_timesteps: int
    prediction_type: str
    sigma_min: float
    sigma_max: float
    spacing: str
    sigma_data: float = 1.0
    shift: float = 1.0
    table: Tensor | None = None  # ln sigma [T], increasing; None where t and sigma have a closed form

    @classmethod
    def linear(
        cls,
        T: int = 1000,
        start: float = 1e-4,
        end: float = 0.02,
        prediction_type: str = "epsilon",
        zero_snr: bool = False,
    ) -> Self:
        """Betas evenly spaced from `start` to `end` (DDPM, arXiv:2006.11239)."""
        betas = {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
        return cls.from_config(_ddim(T, prediction_type, zero_snr, betas))

    @classmethod
    def scaled_linear(
        cls,
        T: int = 1000,
        start: float = 8.5e-4,
        end: float = 0.012,
        prediction_type: str = "epsilon",
        zero_snr: bool = False,
    ) -> Self:
        """Square roots of the betas evenly spaced (latent diffusion, arXiv:2112.10752)."""
        betas = {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
        return cls.from_config(_ddim(T, prediction_type, zero_snr, betas))

    @classmethod
    def cosine(cls, T: int = 1000, prediction_type: str = "epsilon", zero_snr: bool = False) -> Self:
        """abar(t) a squared cosine, betas at most 0.999 (Nichol and Dhariwal, arXiv:2102.09672)."""
        return cls.from_config(_ddim(T, prediction_type, zero_snr, {"beta_schedule": "squaredcos_cap_v2"}))

    @classmethod
    def from_alphas_cumprod(
        cls, table: Tensor | Sequence[float], prediction_type: str = "epsilon", zero_snr: bool = False
    ) -> Self:
        """Any table abar [T], strictly decreasing within (0, 1)."""
        abar = torch.as_tensor(table, dtype=torch.float64).flatten()
        betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        return cls.from_config(_ddim(len(abar), prediction_type, zero_snr, {"trained_betas": betas.tolist()}))

    @classmethod
    def flow(cls, T: int = 1000, shift: float = 1.0) -> Self:
        """Rectified flow, the network predicting n - x0 at t = T s (arXiv:2209.03003).

        `shift` multiplies the sigmas of the sampling steps (arXiv:2403.03206, section 5.3.2); above 1 for large images.
        """
        model = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": T, "steps_offset": 1}
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return cls.from_config(model | flow)

    @classmethod
    def edm(cls, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Self:
        """EDM's preconditioning (Karras et al. 2022, table 1); c_noise = ln(sigma) / 4."""
        sigmas = {"sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max}
        return cls.from_config({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"} | sigmas)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read diffusers' scheduler_config.json; missing and null keys mean what diffusers means by them.

        Raises InputError, naming the field, for a value that is out of range, or a class, a prediction or a beta
        schedule that is not known here.
        """
        name = config.get("_class_name") or "DDIMScheduler"
        _check("_class_name", name, CLASSES)
        given = {k: v for k, v in config.items() if v is not None} | checked(config, FIELDS, "scheduler config")
        values: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "epsilon"} | CLASSES[name] | given
        for key in ("thresholding", "use_dynamic_shifting", "invert_sigmas"):  # another x0 than the denoiser's
            _check(key, values.get(key, False), (False,))
        _check("variance_type", values.get("variance_type", "fixed").split("_")[0], ("fixed",))
        kept = copy.deepcopy(dict(config)) | {"_class_name": name}
        if name.startswith("DD") or "clip_sample" in values:
            kept["clip_sample"] = False  # clipping would make the sampler's x0 another one than the denoiser's
        T = values["num_train_timesteps"]
        if values.get("use_flow_sigmas") and {"shift", "flow_shift"} & values.keys():  # classes that know of flows
            return cls(kept, T, **_flow(values, T))
        return cls(kept, T, **(_edm(values) if name.startswith("EDM") else _table(values, T)))

    def to_config(self) -> dict[str, Any]:
        """scheduler_config.json of a diffusers scheduler that agrees with `Denoiser`.

        The class and the fields that were read, or for a schedule made here DDIM (tables), DPM-Solver++ (flow) or EDM
        Euler.
        """
        return copy.deepcopy(dict(self.config))

    @property
    def zero_snr(self) -> bool:
        """Whether the last timestep is pure noise (arXiv:2305.08891): an epsilon network says nothing of x0 there."""
        return self.table is not None and bool(self.config.get("rescale_betas_zero_snr"))

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level of the network's timestep, fractional or not; clamped to sigma_min .. sigma_max."""
        t = _float64(t)
        if self.table is not None:
            return _interpolate(t, torch.arange(len(self.table), dtype=torch.float64), self.table).exp()
        if self.prediction_type == "flow_prediction":
            s = (t / self.num_train_timesteps).clamp(0, 1)
            return (s / (1 - s)).clamp(self.sigma_min, self.sigma_max)
        return (4 * t).exp().clamp(self.sigma_min, self.sigma_max)

    def timestep(self, sigma: Tensor | float) -> Tensor:
        """The network's timestep, fractional: linear in ln sigma between the table's entries and clamped at its ends;
        T * sigma / (1 + sigma) for a flow; ln(sigma) / 4 for EDM."""
        sigma = _float64(sigma)
        if self.table is not None:
            return _interpolate(sigma.log(), self.table, torch.arange(len(self.table), dtype=torch.float64))
        if self.prediction_type == "flow_prediction":
            return self.num_train_timesteps * sigma / (1 + sigma)
        return sigma.log() / 4

    def log_snr(self, sigma: Tensor | float) -> Tensor:
        """ln(SNR) = -2 ln sigma, for data of unit variance."""
        return -2 * _float64(sigma).log()

    def scaling(self, sigma: Tensor | float) -> Scaling:
        """The coefficients that turn the network's output into x0 (EDM, eq. 7)."""
        sigma = _float64(sigma)
        c_in, c_skip, c_out, _, _ = self._row(sigma)
        return Scaling(c_in, c_skip, c_out, self.timestep(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """What the network should answer to c_in * (x0 + sigma * noise): x0 and noise [B, ...], sigma [B] or a number.

        Written out per prediction, as (x0 - c_skip * x) / c_out would cancel at both ends.
        """
        *_, of_x0, of_noise = (match_shape(value, x0) for value in self._row(_float64(sigma)))
        return of_x0 * x0 + of_noise * noise

    def _row(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(c_in, c_skip, c_out, coefficient of x0 in the target, coefficient of the noise in the target)."""
        one, zero, d = torch.ones_like(sigma), torch.zeros_like(sigma), self.sigma_data
        r = (sigma**2 + d**2).rsqrt()  # d is 1 but for EDM
        match self.prediction_type:
            case "epsilon":
                return r, one, -sigma, zero, one
            case "sample":
                return r, zero, one, one, zero
            case "v_prediction" | "edm_v":
                return r, (d * r) ** 2, -sigma * d * r, -sigma * r / d, d * r
            case "edm":
                return r, (d * r) ** 2, sigma * d * r, sigma * r / d, -d * r
            case _:  # flow_prediction
                return 1 / (1 + sigma), 1 / (1 + sigma), -sigma / (1 + sigma), -one, one


def _check(key: str, value: object, known: Collection[Any]) -> None:
    if value not in tuple(known):
        raise InputError(f"scheduler config: {key} is {ascii(value)[:80]}; supported: {', '.join(map(str, known))}")


def _ddim(T: int, prediction_type: str, zero_snr: bool, betas: dict[str, Any]) -> dict[str, Any]:
    """The config of a table made here. DDIM's first step is then the last timestep, and its last step ends at x0."""
    model = {"_class_name": "DDIMScheduler", "num_train_timesteps": T, "prediction_type": prediction_type}
    sampler = {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": True, "clip_sample": False}
    return model | betas | {"rescale_betas_zero_snr": zero_snr} | sampler


def _flow(values: Mapping[str, Any], T: int) -> dict[str, Any]:
    _check("prediction_type", values["prediction_type"], ("flow_prediction",))
    shift = values["shift" if "shift" in values else "flow_shift"]
    # s -> shift s / (1 + (shift - 1) s) is sigma -> shift sigma; s runs from 1/T to 1 - 1/T
    ends = {"sigma_min": shift / (T - 1), "sigma_max": shift * (T - 1)}
    return ends | {"prediction_type": "flow_prediction", "spacing": "flow", "shift": shift}


def _edm(values: Mapping[str, Any]) -> dict[str, Any]:
    _check("prediction_type", values["prediction_type"], ("epsilon", "v_prediction"))
    if not values["sigma_min"] < values["sigma_max"]:
        raise InputError(f"scheduler config: sigma_max is {values['sigma_max']:g}, and must be above sigma_min")
    sigmas = {key: values[key] for key in ("sigma_min", "sigma_max", "sigma_data")}
    prediction = {"epsilon": "edm", "v_prediction": "edm_v"}[values["prediction_type"]]
    return sigmas | {"prediction_type": prediction, "spacing": values["sigma_schedule"]}


def _table(values: Mapping[str, Any], T: int) -> dict[str, Any]:
    _check("prediction_type", values["prediction_type"], TABLE_PREDICTIONS)
    root_abar = torch.cumprod(1 - _betas(values, T), 0).clamp_min(0).sqrt()
    if values.get("rescale_betas_zero_snr"):  # algorithm 1 of arXiv:2305.08891
        root_abar = (root_abar - root_abar[-1]) * root_abar[0] / (root_abar[0] - root_abar[-1])
        # as diffusers clamps it, and lower where a table has come closer to 0 before: noise rises from step to step
        root_abar[-1] = min(math.sqrt(ZERO_SNR_ABAR), 0.9 * float(root_abar[-2]))
    table = (1 / root_abar**2 - 1).log() / 2
    if not (table.isfinite().all() and (table.diff() > 0).all()):
        raise InputError("scheduler config: the betas must lie in (0, 1), so that the noise rises from step to step")
    ends = {"sigma_min": float(table[0].exp()), "sigma_max": float(table[-1].exp())}
    if values.get("timestep_type") == "continuous" and values["prediction_type"] == "v_prediction":
        return _edm(_EDM | ends | {"sigma_data": 1.0} | dict(values))
    special = [word for word in _WORDS if values.get(f"use_{word}_sigmas")]
    spacing = (special or [values["timestep_spacing"]])[0]
    return ends | {"prediction_type": values["prediction_type"], "spacing": spacing, "table": table}


def _betas(values: Mapping[str, Any], T: int) -> Tensor:
    if (trained := values.get("trained_betas")) is not None:
        if len(trained) != T:
            raise InputError(f"scheduler config: trained_betas must be a list of {T} numbers (num_train_timesteps)")
        return torch.tensor(trained, dtype=torch.float64)
    _check("beta_schedule", values["beta_schedule"], BETA_SCHEDULES)
    if values["beta_schedule"] == "squaredcos_cap_v2":
        abar = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        return (1 - abar[1:] / abar[:-1]).clamp_max(0.999)
    power = 2 if values["beta_schedule"] == "scaled_linear" else 1
    start, end = (values[key] ** (1 / power) for key in ("beta_start", "beta_end"))
    return torch.linspace(start, end, T, dtype=torch.float64) ** power


def _float64(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def match_shape(value: Tensor, x: Tensor) -> Tensor:
    """value, [] or [B], in the dtype of x [B, ...] and to be multiplied with it."""
    value = value.to(x.dtype)
    return value if value.ndim == 0 else value.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))


def _interpolate(at: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """ys(at), linear between the knots xs (increasing), constant outside them."""
    high = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    weight = ((at - xs[high - 1]) / (xs[high] - xs[high - 1])).clamp(0, 1)
    return torch.lerp(ys[high - 1], ys[high], weight)
