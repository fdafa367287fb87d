# The small video DC-AE of 4 x 32 x 32 that comes with the repository, for measuring it.
_base_ = ["../../diffusion/demo_hc_models.py"]
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {16: (1.0, 8)}}
num_workers = 0
dtype = "fp32"
seed = 42
fps = 8
save_dir = "samples/demo_dc_ae_f32"

model = dict(
    from_pretrained="assets/demo/dc_ae.safetensors",
    # It was trained on 16 frames: longer clips go through in tiles that overlap.
    use_temporal_tiling=True,
    temporal_tile_size=16,
    **_base_.hc_ae,
)
