# The small image autoencoder that draws the first frame for the demo: 64x64 pictures, 8 x 8 pixels per latent position.
# On a processor with bf16 instructions in two thirds of the time: --dtype bf16.
_base_ = ["../../diffusion/demo_image_models.py"]
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24, keep_in_memory=True)
bucket_config = {"64px_ar1:1": {1: (1.0, 16)}}
max_steps = 800
num_workers = 0

model = dict(scale_factor=1.0, shift_factor=0.0, **_base_.image_ae)
vae_loss_config = dict(kl_loss_weight=0.2, mse_loss_weight=4.0, object_weight=4.0, perceptual_loss_weight=0.0)

lr = 1.5e-3
optim = dict(cls="HybridAdam", lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
lr_scheduler = dict(warmup_steps=50, cosine=True, flat_share=0.4)
grad_clip = 1.0
ema_decay = 0.99
plugin = "none"

dtype = "fp32"
seed = 42
log_every = 25
ckpt_every = 200
keep_n_latest = 2
