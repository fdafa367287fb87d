# The small image model that draws the first frame for the demo, in the place of FLUX. Its guidance is an input, in
# training the 4 that sampling gives it, so texts are not dropped.
_base_ = ["demo_cpu.py", "../demo_image_models.py"]

bucket_config = {"_delete_": True, "64px_ar1:1": {1: (1.0, 64)}}
condition_config = None
time_sampling = dict(name="uniform", flow_shift=2.0)  # shapes get exact close to the data, below a time of 0.4
guidance = 4.0
dropout_ratio = None

model = dict(
    guidance_embed=True,
    fused_qkv=True,
    use_liger_rope=False,
    cond_embed=False,
    **_base_.image_model,
)
ae = dict(_delete_=True, **_base_.image_ae_in_use)
is_causal_vae = False

flat_share = 0.7
max_steps = 3600
