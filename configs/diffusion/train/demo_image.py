# The small image model that draws the first frame for the demo, in the place of FLUX. Its guidance is an input, in
# training the 4 that sampling gives it, so texts are not dropped.
_base_ = ["demo_cpu.py"]

bucket_config = {"_delete_": True, "64px_ar1:1": {1: (1.0, 64)}}
condition_config = None
time_sampling = dict(name="uniform", flow_shift=2.0)  # shapes get exact close to the data, below a time of 0.4
guidance = 4.0
dropout_ratio = None

model = dict(
    hidden_size=96,
    num_heads=3,
    depth=1,
    depth_single_blocks=4,
    guidance_embed=True,
    fused_qkv=True,
    use_liger_rope=False,
    cond_embed=False,
)
ae = dict(
    _delete_=True,
    type="autoencoder_2d",
    from_pretrained="assets/demo/image_ae.safetensors",
    ch=16,
    ch_mult=[1, 1, 2, 4],
    num_res_blocks=1,
    z_channels=8,
    norm_num_groups=4,
    scale_factor=0.8036,
    shift_factor=-0.0070,
)
is_causal_vae = False

flat_share = 0.7
max_steps = 3600
