# The 11B model in four steps instead of eighty forwards, as a LoRA adapter, on 8 GPUs of 80 GB, from trajectories that
# scripts/diffusion/trajectories.py made with configs/diffusion/trajectories/256px.py:
#
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/distill_11b.py
#
# Memory of each GPU, in GB, worked out from sizes (not measured):
#   weights, bf16, frozen                           23.8
#   adapter of rank 64, 217 million parameters       4.3    fp32: weights, gradients, two moments, exchange buffers
#   inputs of 57 recomputed blocks, batch of 4      12.4    8,828 tokens of 3,072 channels each
#   one block at work, forward and backward         10
#   text encoders, autoencoder                       0      trajectories hold what they make
#                                                   50.5
# training_method="dmd" from the same folder takes a second adapter for the fake score (4.3 more), and its teacher is the
# same model without adapters.
_base_ = ["stage1_i2v.py"]

model = dict(
    from_pretrained="./ckpts/Open_Sora_v2.safetensors",
    strict_load=True,
    grad_ckpt_settings=(100, 100),
)
dataset = dict(_delete_=True, type="trajectories", data_path="outputs/trajectories_256px")
bucket_config = {"_delete_": True, "256px": {129: (1.0, 4)}}
training_method = "trajectory_distillation"
training_method_config = dict(num_steps=4, shares=[1.4, 1.1, 0.8, 0.7])
lora_config = dict(
    r=64,
    lora_alpha=64,
    target_modules=["q_proj", "k_proj", "v_proj", "proj", "v_mlp", "linear2", "img_mlp.0", "img_mlp.2"],
)

lr = 1e-4
optim = dict(_delete_=True, cls="AdamW", lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
warmup_steps = 100
use_cosine_scheduler = True
flat_share = 0.5
ema_decay = 0.99
max_steps = 3000
ckpt_every = 500
num_workers = 2
pin_memory_cache_pre_alloc_numels = None
plugin = "ddp"
plugin_config = dict(_delete_=True)
