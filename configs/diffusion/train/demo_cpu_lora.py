# LoRA on the small model that comes with the repository. On a CPU.
_base_ = ["demo_cpu.py"]

model = dict(from_pretrained="assets/demo/mmdit.safetensors")
lora_config = dict(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "proj", "v_mlp", "linear2"],
)
lr = 1e-3
optim = dict(lr=lr)
ema_decay = None
max_steps = 500
