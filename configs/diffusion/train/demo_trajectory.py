# The small model in four steps (or 8, 2, 1: training_method_config.num_steps) instead of thirty with guidance, from
# trajectories that scripts/diffusion/trajectories.py made with configs/diffusion/trajectories/demo.py. On a CPU.
_base_ = ["demo_cpu.py"]
time_sampling = None  # the method has times of its own

model = dict(from_pretrained="assets/demo/mmdit.safetensors")
dataset = dict(_delete_=True, type="trajectories", data_path="outputs/demo_trajectories")
bucket_config = {"64px_ar1:1": {17: (1.0, 32)}}
keep_encoded = False
training_method = "trajectory_distillation"
training_method_config = dict(num_steps=4, shares=[1.4, 1.1, 0.8, 0.7])  # most of the error comes early

lr = 1e-3
optim = dict(lr=lr)
warmup_steps = 20
ema_decay = 0.98
flat_share = 0.4
max_steps = 560
log_every = 20
ckpt_every = 80
