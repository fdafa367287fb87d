# The causal video VAE that comes with the repository, for measuring it (scripts/vae/inference.py, scripts/vae/stats.py,
# tools/demo/evaluate_vae.py).
_base_ = ["../../diffusion/demo_vae.py"]
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {17: (1.0, 8)}}
num_workers = 0
dtype = "fp32"
seed = 42
fps = 8
save_dir = "samples/demo_vae"

model = dict(
    **_base_.vae_in_use,
    scale_factor=1.0,
    # It was trained on 17 frames: longer clips go through in tiles of 21 that overlap.
    use_temporal_tiling=True,
    sample_tsize=20,
)
