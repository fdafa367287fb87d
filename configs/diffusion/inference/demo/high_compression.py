# Small twin of ../high_compression.py: 4 x 32 x 32 compression, patch 1, the models of ../../train/demo_cpu_hc.py. A
# frame of 64px has 2 x 2 latents; larger ones go through the autoencoder in tiles of that size.
_base_ = ["t2i2v_768px.py", "../../demo_hc_models.py"]

plugin = None
plugin_config = None
plugin_ae = None
plugin_config_ae = None

patch_size = 1
model = dict(from_pretrained="assets/demo/mmdit_hc.safetensors", cond_embed=True, **_base_.hc_model)
ae = dict(
    _delete_=True,
    model_name="dc-ae-f32t4c128",
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    spatial_tile_size=64,
    temporal_tile_size=16,
    tile_overlap_factor=0.25,
    **_base_.hc_ae_in_use,
)
sampling_option = dict(
    num_frames=16,  # as in its training; longer videos are made in windows that begin with the last latent before
    window=16,
    overlap=4,
    guidance=1.0,
    guidance_img=1.0,
)
