"""The deep-compression video autoencoder; registered as ``dc_ae``."""

from opensora.models.dc_ae.autoencoder import DCAE, build_dc_ae
from opensora.models.dc_ae.config import CoderConfig, DCAEConfig

__all__ = ["DCAE", "CoderConfig", "DCAEConfig", "build_dc_ae"]
