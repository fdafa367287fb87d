"""What can be wrong with the drawn times and the weights of the loss."""

from collections.abc import Mapping
from types import MappingProxyType

from opensora.config.choices import CONDITIONS
from opensora.config.commands import TrainOptions
from opensora.config.options import Options
from opensora.diffusion.windows import CLIP
from opensora.encoded.config import TrajectoriesConfig
from opensora.training.methods.base import TrainingMethod
from opensora.utils.errors import UserError

# Keys that only one of the shipped names reads; a function of a user's own may read any.
OWN_KEYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "time_sampling": {"mean": "logit_normal", "width": "logit_normal", "mode_scale": "mode"},
        "loss_weighting": {"gamma": "min_snr"},
    }
)
SHIPPED = ("logit_normal", "uniform", "mode", "cosmap", "min_snr", "sigma_sqrt", None)


def check_objective(cfg: TrainOptions, method: type[TrainingMethod]) -> None:
    """See that ``time_sampling`` and ``loss_weighting`` make sense, together and with the training method.

    Raises:
        UserError: names the key and what would be right.
    """
    times, weighting = cfg.time_sampling, cfg.loss_weighting
    _check_own_keys("time_sampling", times, "name", times.name)
    _check_own_keys("loss_weighting", weighting, "time", weighting.time)
    if times.flow_shift is not None and not times.shift:
        raise UserError("time_sampling.flow_shift is set and time_sampling.shift is False: leave one out")
    drawn = {**(cfg.condition_config or {"t2v": 1}), **({CLIP: 1} if cfg.window is not None else {})}
    for name in weighting.conditions or {}:
        if name not in CONDITIONS:
            raise UserError(f"loss_weighting.conditions: unknown condition {name!r}; valid: {CONDITIONS.listing}")
        if name != "t2v" and not drawn.get(name):
            raise UserError(f"loss_weighting.conditions: {name} is not drawn; give it a weight in condition_config")
    if weighting.conditions is not None and not cfg.condition_config:
        raise UserError("loss_weighting.conditions: without condition_config all samples are t2v; leave it out")
    fixed = not method.weighs or isinstance(cfg.dataset, TrajectoriesConfig)
    for key, section in (("time_sampling", times), ("loss_weighting", weighting)):
        if fixed and section.to_dict() != type(section)().to_dict():
            on = " on trajectories" if method.weighs else ""
            raise UserError(f"{key}: training_method={cfg.training_method}{on} has its own; leave the section out")


def _check_own_keys(path: str, section: Options, chooser: str, name: str | None) -> None:
    if name not in SHIPPED:
        return
    for key, owner in OWN_KEYS[path].items():
        if key in section.given and name != owner:
            raise UserError(f"{path}.{key} belongs to {path}.{chooser}={owner}, which is {name}; leave it out")
