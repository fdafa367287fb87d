# The small model that comes with the repository: text or a picture to 64x64 videos of 17 frames, on a CPU in seconds.
_base_ = ["../demo_models.py"]
save_dir = "samples"
seed = 42  # of everything random except a sample's noise, which is sampling_option.seed
batch_size = 1
dtype = "fp32"
cond_type = "t2v"  # or i2v_head with --ref
dataset = dict(type="text")

sampling_option = dict(
    resolution="64px",
    aspect_ratio="1:1",
    num_frames=17,
    num_steps=30,
    shift=True,
    temporal_reduction=4,
    is_causal_vae=True,
    guidance=5.0,
    guidance_img=1.5,
    text_osci=False,
    image_osci=False,
    scale_temporal_osci=False,
    method="i2v",
    seed=None,
)
fps_save = 8

model = dict(
    type="flux",
    from_pretrained="assets/demo/mmdit.safetensors",
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
