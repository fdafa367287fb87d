# The small image autoencoder that comes with the repository, for measuring it.
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {1: (1.0, 32)}}
num_workers = 0
dtype = "fp32"
seed = 42
fps = 8
save_dir = "samples/demo_image"

model = dict(
    type="autoencoder_2d",
    from_pretrained="assets/demo/image_ae.safetensors",
    ch=16,
    ch_mult=[1, 1, 2, 4],
    num_res_blocks=1,
    z_channels=8,
    norm_num_groups=4,
    scale_factor=1.0,
    shift_factor=0.0,
)
