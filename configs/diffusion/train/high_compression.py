# Open-Sora 2.0 with the Video DC-AE (4 x 32 x 32): 768px, frames in multiples of 4, one latent pixel per token.
_base_ = ["image.py"]

bucket_config = {
    "_delete_": True,
    "768px": {
        1: (1.0, 20),
        **{frames: (1.0, 8) for frames in range(16, 33, 4)},
        **{frames: (1.0, 4) for frames in range(36, 65, 4)},
        **{frames: (1.0, 3) for frames in range(68, 97, 4)},
        **{frames: (1.0, 2) for frames in range(100, 129, 4)},
    },
}
condition_config = dict(t2v=1, i2v_head=7)  # relative weights
patch_size = 1
model = dict(
    in_channels=128,
    cond_embed=True,
    patch_size=1,
    grad_ckpt_settings=(100, 100),  # every block
)
ae = dict(
    _delete_=True,
    type="dc_ae",
    model_name="dc-ae-f32t4c128",
    from_pretrained="./ckpts/F32T4C128_AE.safetensors",
    from_scratch=True,
    scaling_factor=0.493,
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    spatial_tile_size=256,
    temporal_tile_size=32,
    tile_overlap_factor=0.25,
)
is_causal_vae = False

lr = 3e-5
optim = dict(lr=lr)
ckpt_every = 250
