# The small video DC-AE of configs/vae/train/demo_dc_ae.py; its weights are given with --ckpt-path CHECKPOINT.
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {16: (1.0, 8)}}
num_workers = 0
dtype = "fp32"
seed = 42
fps = 8
save_dir = "samples/demo_dc_ae"

stages = dict(
    width_list=[8, 16, 32, 64],
    depth_list=[1, 1, 2, 2],
    block_type=["ResBlock", "ResBlock", "ResBlock", "EViTS5_GLU"],
)
model = dict(
    type="dc_ae",
    from_scratch=True,
    latent_channels=16,
    encoder=dict(temporal_downsample=[False, True, True, False], **stages),
    decoder=dict(temporal_upsample=[False, True, True, False], **stages),
    # It was trained on 16 frames: longer clips go through in tiles that overlap.
    use_temporal_tiling=True,
    temporal_tile_size=16,
)
