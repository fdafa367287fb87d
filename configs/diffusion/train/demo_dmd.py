# The small model in four steps by DMD2, from its own weights: the student's videos are to be distributed as the
# teacher's, which has no use for guidance. Five optimizer steps make one update of the student.
_base_ = ["demo_further.py"]
time_sampling = None  # the method has times of its own
dropout_ratio = None

bucket_config = {"64px_ar1:1": {17: (1.0, 96), 33: (1.0, 96)}}
training_method = "dmd"
training_method_config = dict(
    num_steps=4,
    positions=[1, 0.8125, 0.59375, 0.328125, 0],  # bf16 holds these exactly, so the model is told what it sees
    flow_shift=1.0,
    teacher="assets/demo/mmdit.safetensors",
    guidance=1.0,
    fake_warmup=100,
    fake_updates=5,
    fake_optim=dict(cls="AdamW", lr=4e-4, betas=(0.0, 0.99), weight_decay=0.0),
    score_shift=1.5,
)

lr = 2e-4
optim = dict(_delete_=True, cls="AdamW", lr=lr, betas=(0.0, 0.99), weight_decay=0.0)
warmup_steps = 100
use_cosine_scheduler = True
flat_share = 0.5
ema_decay = 0.99  # over the student's updates
max_steps = 5100
log_every = 100
ckpt_every = 500
