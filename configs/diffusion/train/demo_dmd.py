# The small model in four steps by DMD2, on from the student of demo_trajectory.py: --model.from_pretrained
# outputs/demo_4step/.../ema.safetensors. Five optimizer steps make one update of the student. On a CPU.
_base_ = ["demo_trajectory.py"]

training_method = "dmd"
training_method_config = dict(
    _delete_=True,
    num_steps=4,
    teacher="assets/demo/mmdit.safetensors",
    guidance=3.5,
    guidance_img=1.5,
    fake_updates=5,
    fake_optim=dict(cls="AdamW", lr=5e-5, betas=(0.0, 0.99)),
)
bucket_config = {"64px_ar1:1": {17: (1.0, 16)}}

lr = 2e-5
optim = dict(_delete_=True, cls="AdamW", lr=lr, betas=(0.0, 0.99), weight_decay=0.0)
use_cosine_scheduler = False
max_steps = 5000
ckpt_every = 500
