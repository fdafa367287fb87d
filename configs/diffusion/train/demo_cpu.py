# A small text- and image-to-video model for 64x64 clips, trained on two CPU cores in about an hour.
_base_ = ["../demo_models.py"]
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {17: (1.0, 48)}}
num_workers = 0
keep_encoded = True  # 6,000 clips are few enough to be read and encoded once

patch_size = 2
# Images are given on 40 % of the samples.
condition_config = dict(t2v=6, i2v_head=3, i2v_tail=0.5, i2v_loop=0.5)
# Most is decided near noise, as some channels of the latents are strong; outlines get exact at times below 0.4.
time_sampling = dict(name="uniform", flow_shift=2.0)
dropout_ratio = dict(t5=0.25, clip=0.25)  # both are dropped on one sample in sixteen
is_causal_vae = True

lr = 1.5e-3
optim = dict(cls="Muon", lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
warmup_steps = 100
use_cosine_scheduler = True
flat_share = 0.4
grad_clip = 1.0
ema_decay = 0.999
max_steps = 3200
grad_checkpoint = False
plugin = "none"

dtype = "fp32"
seed = 42
log_every = 50
ckpt_every = 400
keep_n_latest = 2
