# A small causal video VAE for 64x64 clips, trained on a CPU in about half an hour.
_base_ = ["../../diffusion/demo_vae.py"]
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24, keep_in_memory=True)

# Single frames first: they cost 1/17 of a clip, and teach most of what a frame needs.
image_steps = 3200
image_bucket_config = {"64px_ar1:1": {1: (1.0, 16)}}
image_lr = 1e-3
bucket_config = {"64px_ar1:1": {17: (1.0, 2)}}
max_steps = 5000
num_workers = 0

model = dict(scale_factor=1.0, **_base_.vae_as_trained)
vae_loss_config = dict(kl_loss_weight=0.05, mse_loss_weight=4.0, object_weight=4.0, perceptual_loss_weight=0.0)

lr = 4e-4
optim = dict(cls="HybridAdam", lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
lr_scheduler = dict(warmup_steps=50, cosine=True, flat_share=0.4)
grad_clip = 1.0
ema_decay = 0.99
plugin = "none"

dtype = "fp32"
seed = 42
log_every = 50
ckpt_every = 500
keep_n_latest = 2
