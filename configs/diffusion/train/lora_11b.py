# LoRA on the 11B model, on one card of 24 GB (docs/finetune.md): 256px, 33 and 129 frames, from a cache of latents and
# texts that scripts/diffusion/cache.py made with this config. --dry-run True prints where the memory goes.
_base_ = ["stage1_i2v.py"]

model = dict(
    from_pretrained="./ckpts/Open_Sora_v2.safetensors",
    strict_load=True,
    grad_ckpt_settings=(100, 100),  # every block
    quantize="nf4",  # 4-bit base weights: approximate; int8 needs 4 GB more and no further package
)
cached_video = True
cached_text = True
cache_dir = "datasets/cache_11b"
bucket_config = {"_delete_": True, "256px": {33: (1.0, 2), 129: (1.0, 1)}}
condition_config = dict(t2v=1, i2v_head=1)

lora_config = dict(
    r=16,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "proj", "v_mlp", "linear2"],
)
lora_dtype = "bf16"
lr = 1e-4
optim = dict(_delete_=True, cls="AdamW", lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
warmup_steps = 50
ema_decay = 0.99
accumulation_steps = 4
max_steps = 1000
ckpt_every = 100
keep_n_latest = 3
num_workers = 2
pin_memory_cache_pre_alloc_numels = None
plugin = "none"
plugin_config = dict(_delete_=True)
