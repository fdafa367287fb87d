# Small twin of ../high_compression.py: 4 x 32 x 32 compression, patch 1. The weights of its diffusion model and
# autoencoder are random: the picture drawn first is real and so is the way to the video, which is noise.
_base_ = ["t2i2v_768px.py"]

plugin = None
plugin_config = None
plugin_ae = None
plugin_config_ae = None

patch_size = 1
model = dict(
    from_pretrained=None,
    in_channels=32,
    cond_embed=True,
    patch_size=1,
)
ae = dict(
    _delete_=True,
    type="dc_ae",
    from_scratch=True,
    model_name="dc-ae-f32t4c128",
    from_pretrained=None,
    latent_channels=32,
    encoder=dict(width_list=[8, 8, 16, 32, 32, 32], depth_list=[1, 1, 1, 1, 1, 1]),
    decoder=dict(width_list=[8, 8, 16, 32, 32, 32], depth_list=[1, 1, 1, 1, 1, 1]),
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    spatial_tile_size=96,
    temporal_tile_size=8,
    tile_overlap_factor=0.25,
)
sampling_option = dict(resolution="128px", num_frames=16)
