# All weights of the 11B model on one card of 80 GB (docs/finetune.md): 256px, 33 and 129 frames, from a cache of
# latents and texts that scripts/diffusion/cache.py made with this config. The fp32 weights and the optimizer's moments,
# in 8 bits, are in host memory (72 GB of it); the backward pass updates each weight and frees its gradient.
# --dry-run True prints where the memory goes.
_base_ = ["stage1_i2v.py"]

model = dict(
    from_pretrained="./ckpts/Open_Sora_v2.safetensors",
    strict_load=True,
    grad_ckpt_settings=(100, 100),  # every block
)
cached_video = True
cached_text = True
cache_dir = "datasets/cache_11b"
bucket_config = {"_delete_": True, "256px": {33: (1.0, 32), 129: (1.0, 8)}}  # of a quarter, 48 GB suffice
condition_config = dict(t2v=1, i2v_head=1)

lr = 1e-5
optim = dict(
    _delete_=True,
    cls="AdamW8bit",  # approximate; AdamW takes 71 GB more of the host, and is exact
    lr=lr,
    betas=(0.9, 0.99),
    weight_decay=0.0,
    states="host",
    in_backward=True,
)
grad_clip = 0.0  # the norm of all gradients is known when they are gone
accumulation_steps = 1
warmup_steps = 50
ema_decay = None  # an average takes 48 GB more of the host
save_master_weights = True
load_master_weights = True
max_steps = 1000
ckpt_every = 250
keep_n_latest = 2
num_workers = 2
pin_memory_cache_pre_alloc_numels = None
plugin = "none"
plugin_config = dict(_delete_=True)
