# Small twin of ../../plugins/t2i2v.py: the models of ../../../train/demo_image.py, which draw 64px pictures.
_base_ = ["../../plugins/t2i2v.py"]

img_resolution = "64px"
img_flux = dict(
    from_pretrained="assets/demo/image_mmdit.safetensors",
    in_channels=32,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=96,
    num_heads=3,
    depth=1,
    depth_single_blocks=4,
    axes_dim=[8, 12, 12],
)
img_flux_ae = dict(
    from_pretrained="assets/demo/image_ae.safetensors",
    ch=16,
    ch_mult=[1, 1, 2, 4],
    num_res_blocks=1,
    z_channels=8,
    norm_num_groups=4,
    scale_factor=0.8036,
    shift_factor=-0.0070,
)
