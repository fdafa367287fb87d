# The small image model that draws the first frame for the demo, and its autoencoder: what training, sampling and
# measuring share. They are variables; each config says which of its sections they are.
image_model = dict(
    in_channels=32,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=96,
    num_heads=3,
    depth=1,
    depth_single_blocks=4,
    axes_dim=[8, 12, 12],
)
image_ae = dict(
    type="autoencoder_2d",
    ch=16,
    ch_mult=[1, 1, 2, 4],
    num_res_blocks=1,
    z_channels=8,
    norm_num_groups=4,
)
# How a diffusion model reads the latents: their statistics, measured by scripts/vae/stats.py.
image_ae_in_use = dict(
    from_pretrained="assets/demo/image_ae.safetensors",
    scale_factor=0.8036,
    shift_factor=-0.0070,
    **image_ae,
)
