# A small video DC-AE (4 x 8 x 8) for 64x64 clips, for a CPU.
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24, keep_in_memory=True)

# Single frames first: they are cheap, and teach most of what a frame needs.
image_steps = 1800
image_bucket_config = {"64px_ar1:1": {1: (1.0, 16)}}
image_lr = 1e-3
bucket_config = {"64px_ar1:1": {16: (1.0, 2)}}
max_steps = 4600
num_workers = 0

stages = dict(
    width_list=[8, 16, 32, 64],
    depth_list=[1, 1, 2, 2],
    block_type=["ResBlock", "ResBlock", "ResBlock", "EViTS5_GLU"],
)
model = dict(
    type="dc_ae",
    from_scratch=True,
    is_training=True,
    latent_channels=16,
    encoder=dict(temporal_downsample=[False, True, True, False], **stages),
    decoder=dict(temporal_upsample=[False, True, True, False], **stages),
)
# No perceptual loss: on flat shapes it has little to add. Object pixels count more, since they are few.
vae_loss_config = dict(kl_loss_weight=0.0, mse_loss_weight=4.0, object_weight=4.0, perceptual_loss_weight=0.0)

# Clips are cut to a random length (1, 8, 12 or 16 frames): it learns pictures too, and a step costs half.
mixed_strategy = "mixed_video_random"

lr = 4e-4
optim = dict(cls="HybridAdam", lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
lr_scheduler = dict(warmup_steps=50, cosine=True, flat_share=0.4)
grad_clip = 1.0
ema_decay = 0.99
plugin = "none"

dtype = "fp32"
seed = 42
log_every = 50
ckpt_every = 500
keep_n_latest = 2
