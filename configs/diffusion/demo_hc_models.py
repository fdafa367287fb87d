# The small high-compression pair, a DC-AE of 4 x 32 x 32 and its diffusion model: the layouts that training, sampling
# and measuring share. They are variables, each config says which of its sections they are.
hc_model = dict(in_channels=32, patch_size=1, hidden_size=96, num_heads=3, depth=1, depth_single_blocks=4)
hc_stages = dict(
    width_list=[8, 16, 32, 32, 32, 64],
    depth_list=[1, 1, 1, 1, 1, 1],
    block_type="ResBlock",
)
hc_ae = dict(
    type="dc_ae",
    from_scratch=True,
    latent_channels=32,
    encoder=dict(temporal_downsample=[False, True, True, False, False, False], **hc_stages),
    decoder=dict(temporal_upsample=[False, True, True, False, False, False], **hc_stages),
)
# Its scale is the latents' standard deviation, measured by scripts/vae/stats.py.
hc_ae_in_use = dict(from_pretrained="assets/demo/dc_ae.safetensors", scaling_factor=1.8149, **hc_ae)
