"""The causal 3D video autoencoder (registered as ``hunyuan_vae``). Its configuration is read without torch."""

from typing import TYPE_CHECKING

from opensora.models.hunyuan_vae.config import HunyuanVAEConfig
from opensora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D, build_hunyuan_vae

__all__ = ["AutoencoderKLCausal3D", "HunyuanVAEConfig", "build_hunyuan_vae"]

__getattr__ = lazy_names(__name__, {"AutoencoderKLCausal3D": "autoencoder", "build_hunyuan_vae": "autoencoder"})
