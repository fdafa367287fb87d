# The small model on single frames and clips mixed, with the first frame, the last one or both given. On a CPU.
_base_ = ["demo_cpu.py"]

bucket_config = {"_delete_": True, "64px_ar1:1": {1: (1.0, 48), 9: (1.0, 24), 17: ((1.0, 0.3), 12)}}
condition_config = dict(_delete_=True, t2v=1, i2v_head=5, i2v_loop=1, i2v_tail=1)  # relative weights
grad_checkpoint = True
model = dict(grad_ckpt_settings=(1, 2))  # one double and two single blocks recompute in backward
keep_encoded = False
dataset = dict(keep_in_memory=True)
