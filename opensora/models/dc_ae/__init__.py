"""The deep-compression video autoencoder (registered as ``dc_ae``). Its configuration is read without torch."""

from typing import TYPE_CHECKING

from opensora.models.dc_ae.config import DCAEConfig
from opensora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from opensora.models.dc_ae.autoencoder import DCAE, build_dc_ae

__all__ = ["DCAE", "DCAEConfig", "build_dc_ae"]

__getattr__ = lazy_names(__name__, {"DCAE": "autoencoder", "build_dc_ae": "autoencoder"})
