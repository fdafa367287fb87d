# The demo model trained on from its shipped weights on a GPU, in minutes: larger batches of what demo_further.py trains
# on, which cost a GPU hardly more than small ones.
_base_ = ["demo_further.py"]
bucket_config = {"64px_ar1:1": {17: (1.0, 256), 33: (1.0, 256)}}
num_workers = 6
dtype = "bf16"
save_master_weights = True
warmup_steps = 100
flat_share = 0.35
max_steps = 9000
log_every = 100
ckpt_every = 1000
