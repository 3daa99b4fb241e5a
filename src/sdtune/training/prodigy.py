"""Prodigy without waiting for the device. Imports prodigyopt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import prodigyopt  # type: ignore[import-untyped]
import torch
from torch import Tensor


class Prodigy(prodigyopt.Prodigy):  # type: ignore[misc]
    """Prodigy (Mishchenko & Defazio 2023, algorithm 4), with the estimate of the step size on the device.

    The step of prodigyopt reads two numbers of each tensor on the host, and so waits for the device each time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters; returns the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        rate = max(group["lr"] for group in self.param_groups)
        if not parameters or rate <= 0:
            return loss
        first = self.param_groups[0]
        for name in ("d", "d_max", "d_numerator"):
            first[name] = _scalar(first[name], parameters[0].device)
        step_size = first["d"] * rate * _bias_correction(first)
        numerator, denominator = self._update_moments(step_size)
        has_gradient = denominator > 0
        self._update_estimate(numerator, denominator, has_gradient)
        # Without any gradient so far, nothing moves.
        self._update_parameters(torch.where(has_gradient, step_size, torch.zeros_like(step_size)))
        return loss

    def _update_moments(self, step_size: Tensor) -> tuple[Tensor, Tensor]:
        """Update the moments of all parameters; returns numerator and denominator of the estimate."""
        d, d0 = self.param_groups[0]["d"], self.param_groups[0]["d0"]
        beta1, beta2 = self.param_groups[0]["betas"]
        beta3 = _beta3(self.param_groups[0])
        numerator, denominator = self.param_groups[0]["d_numerator"] * beta3, torch.zeros_like(d)
        for group in self.param_groups:
            weight = d / d0 * (d if group["safeguard_warmup"] else step_size)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad, self.state[parameter]
                if group["weight_decay"] != 0 and not group["decouple"]:
                    gradient.add_(parameter, alpha=group["weight_decay"])
                if not state:
                    _start(state, parameter, group["slice_p"], beta1 > 0)
                if group["lr"] <= 0:
                    continue
                part, values = (tensor.flatten()[:: group["slice_p"]] for tensor in (gradient, parameter))
                numerator = numerator + d / d0 * step_size * torch.dot(part, state["p0"] - values)
                scaled = gradient * d.to(gradient.dtype)
                if beta1 > 0:
                    state["exp_avg"].mul_(beta1).add_(scaled, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
                state["s"].mul_(beta3).add_(part * weight.to(part.dtype))
                denominator = denominator + state["s"].abs().sum()
        return numerator, denominator

    def _update_estimate(self, numerator: Tensor, denominator: Tensor, is_updated: Tensor) -> None:
        """Update the estimate of the distance D, where ``is_updated``."""
        first = self.param_groups[0]
        d, d_max = first["d"], first["d_max"]
        d_hat = torch.where(is_updated, first["d_coef"] * numerator / denominator, d)
        grown = torch.where(d == first["d0"], torch.maximum(d, d_hat), d)
        new_max = torch.where(is_updated, torch.maximum(d_max, d_hat), d_max)
        new = torch.where(is_updated, torch.minimum(new_max, grown * first["growth_rate"]), d)
        kept = torch.where(is_updated, numerator, first["d_numerator"])
        for group in self.param_groups:
            group |= {"d": new, "d_max": new_max, "d_numerator": kept, "d_hat": d_hat, "k": group["k"] + 1}

    def _update_parameters(self, step_size: Tensor) -> None:
        beta1 = self.param_groups[0]["betas"][0]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                size, d = step_size.to(parameter.dtype), group["d"].to(parameter.dtype)
                denominator = state["exp_avg_sq"].sqrt().add_(d * group["eps"])
                if group["weight_decay"] != 0 and group["decouple"]:
                    parameter.mul_(1 - group["weight_decay"] * size)
                direction = state["exp_avg"] if beta1 > 0 else parameter.grad * d
                parameter.sub_((direction / denominator).mul_(size))


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """``value`` as a tensor without dimensions; after loading a checkpoint it may be on another device."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(value, dtype=dtype, device=device)


def _beta3(group: dict[str, Any]) -> float:
    return float(math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"])


def _bias_correction(group: dict[str, Any]) -> float:
    """Factor on the step size for Adam's bias correction; 1 if ``use_bias_correction`` is false."""
    if not group["use_bias_correction"]:
        return 1.0
    beta1, beta2 = group["betas"]
    return float((1 - beta2 ** (group["k"] + 1)) ** 0.5 / (1 - beta1 ** (group["k"] + 1)))


def _start(state: dict[str, Any], parameter: Tensor, slice_p: int, first_moment: bool) -> None:
    """Set the initial state of ``parameter``. If all its values are 0, only one zero is stored for ``p0``."""
    part = parameter.flatten()[::slice_p]
    state["step"], state["s"] = 0, torch.zeros_like(part)
    state["p0"] = part.clone() if parameter.any() else torch.zeros((), dtype=part.dtype, device=part.device)
    if first_moment:
        state["exp_avg"] = torch.zeros_like(parameter)
    state["exp_avg_sq"] = torch.zeros_like(parameter)
