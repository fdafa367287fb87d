# The causal video VAE that comes with the repository, for measuring it (scripts/vae/inference.py, scripts/vae/stats.py,
# tools/demo/evaluate_vae.py).
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {17: (1.0, 8)}}
num_workers = 0
dtype = "fp32"
seed = 42
fps = 8
save_dir = "samples/demo_vae"

model = dict(
    type="hunyuan_vae",
    from_pretrained="assets/demo/vae.safetensors",
    block_out_channels=(8, 16, 32, 64),
    decoder_block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=4,
    scale_factor=1.0,
    # It was trained on 17 frames: longer clips go through in tiles of 21 that overlap.
    use_temporal_tiling=True,
    sample_tsize=20,
)
