# Open-Sora 2.0, 11B, on images at 256px, 768px and 1024px; the other configs of the 11B model build on this one.
# Start from a converted flux model with --model.from_pretrained (docs/train.md), give clips with --dataset.data-path.
dataset = dict(type="video_text", transform_name="resize_crop", fps_max=24, vmaf=True)
# {resolution: {frames: (probability, batch size)}}; batch sizes are for devices with 140 GB
bucket_config = {
    "256px": {1: (1.0, 50)},
    "768px": {1: (0.5, 11)},
    "1024px": {1: (0.5, 7)},
}
num_workers = 12
num_bucket_build_workers = 64
prefetch_factor = 2

model = dict(
    type="flux",
    from_pretrained=None,
    strict_load=False,  # a flux file has no condition embedder, and has a guidance embedder
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    grad_ckpt_settings=(8, 100),  # double and single blocks that recompute in backward: 8 of 19, all of 38
    in_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=[16, 56, 56],
    theta=10_000,
    qkv_bias=True,
)
ae = dict(
    type="hunyuan_vae",
    from_pretrained="./ckpts/hunyuan_vae.safetensors",
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    latent_channels=16,
    use_spatial_tiling=True,
    use_temporal_tiling=False,
)
is_causal_vae = True
t5 = dict(type="text_embedder", from_pretrained="./ckpts/google/t5-v1_1-xxl", max_length=512, shardformer=True)
clip = dict(type="text_embedder", from_pretrained="./ckpts/openai/clip-vit-large-patch14", max_length=77)
dropout_ratio = dict(t5=0.31622777, clip=0.31622777)  # sqrt(0.1) each: both are dropped on one sample in ten

lr = 1e-5
optim = dict(cls="HybridAdam", lr=lr, eps=1e-15, weight_decay=0.0, adamw_mode=True)
warmup_steps = 0
update_warmup_steps = True
grad_clip = 1.0
accumulation_steps = 1
ema_decay = None

dtype = "bf16"
grad_checkpoint = True
plugin = "zero2"
plugin_config = dict(reduce_bucket_size_in_m=128, overlap_allgather=False)
# room for 24 videos of 260 and 4 of 34 million pixel values, with some to spare
pin_memory_cache_pre_alloc_numels = [(260 + 20) * 1024 * 1024] * 24 + [(34 + 20) * 1024 * 1024] * 4
async_io = False

seed = 42
outputs = "outputs"
epochs = 1000
log_every = 10
ckpt_every = 100
keep_n_latest = 20
wandb_project = "mmdit"
save_master_weights = True
load_master_weights = True
