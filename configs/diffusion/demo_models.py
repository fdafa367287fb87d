# The shipped small models that stay fixed while the diffusion model is trained, and that sampling needs too.
# Scale and shift are the latents' statistics, measured by scripts/vae/stats.py.
ae = dict(
    type="hunyuan_vae",
    from_pretrained="assets/demo/vae.safetensors",
    block_out_channels=(8, 16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=4,
    scale_factor=[0.1237, 0.5934, 0.1813, 0.4768, 0.6850, 0.6291, 0.7269, 0.2714],
    shift_factor=[-0.9448, 1.2699, 0.0499, -0.8611, 0.1039, -0.9750, 1.1321, -0.4593],
)
t5 = dict(type="text_embedder", from_pretrained="assets/demo/google/t5-demo", max_length=24)
clip = dict(type="text_embedder", from_pretrained="assets/demo/openai/clip-demo", max_length=77)
