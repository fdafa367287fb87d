# Small twin of ../../plugins/t2i2v.py: no weight files, so both models start from random weights (drawn from `seed`).
_base_ = ["../../plugins/t2i2v.py"]

img_resolution = "96px"
img_flux = dict(
    from_pretrained=None,
    in_channels=32,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=[8, 12, 12],
)
img_flux_ae = dict(
    from_pretrained=None,
    ch=32,
    ch_mult=[1, 1, 1, 1],
    num_res_blocks=1,
    z_channels=8,
)
