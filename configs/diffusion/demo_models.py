# The small models that training and sampling share: the diffusion model's layout, and the autoencoder and text
# encoders that come with the repository and stay fixed while it is trained.
_base_ = ["demo_vae.py"]
model = dict(
    type="flux",
    in_channels=32,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=160,
    mlp_ratio=4.0,
    num_heads=5,
    depth=2,
    depth_single_blocks=4,
    axes_dim=[8, 12, 12],
    theta=10_000,
    qkv_bias=True,
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    cond_embed=True,
    patch_size=2,
)
# Scale and shift are the latents' statistics, measured by scripts/vae/stats.py.
ae = dict(
    **_base_.vae_in_use,
    scale_factor=[0.9306, 1.5383, 0.6065, 0.4682, 1.6611, 1.8778, 0.4981, 1.0471],
    shift_factor=[0.0384, 0.0350, -0.0204, -0.0257, -0.0317, -0.0576, 0.0036, -0.0117],
)
t5 = dict(type="text_embedder", from_pretrained="assets/demo/google/t5-demo", max_length=24)
clip = dict(type="text_embedder", from_pretrained="assets/demo/openai/clip-demo", max_length=77)
