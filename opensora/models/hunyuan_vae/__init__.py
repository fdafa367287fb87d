"""The causal 3D video autoencoder; registered as ``hunyuan_vae``."""

from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D, build_hunyuan_vae
from opensora.models.hunyuan_vae.config import HunyuanVAEConfig

__all__ = ["AutoencoderKLCausal3D", "HunyuanVAEConfig", "build_hunyuan_vae"]
