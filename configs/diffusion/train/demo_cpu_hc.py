# The small high-compression pair: a DC-AE of 4 x 32 x 32 that comes with the repository, and one latent pixel per token,
# 16 tokens for 16 frames. On a CPU.
_base_ = ["demo_cpu.py", "../demo_hc_models.py"]

bucket_config = {"_delete_": True, "64px_ar1:1": {16: (1.0, 48)}}
condition_config = dict(_delete_=True, t2v=1, i2v_head=3)  # relative weights: its videos start from a picture
window = None
patch_size = 1
model = _base_.hc_model
ae = dict(_delete_=True, **_base_.hc_ae_in_use)
is_causal_vae = False
ema_decay = 0.998
max_steps = 1800
