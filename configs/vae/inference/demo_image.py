# The small image autoencoder that comes with the repository, for measuring it.
_base_ = ["../../diffusion/demo_image_models.py"]
dataset = dict(type="video_text", data_path="datasets/demo/clips.csv", fps_max=24)
bucket_config = {"64px_ar1:1": {1: (1.0, 32)}}
num_workers = 0
dtype = "fp32"
seed = 42
fps = 8
save_dir = "samples/demo_image"

model = dict(from_pretrained="assets/demo/image_ae.safetensors", scale_factor=1.0, shift_factor=0.0, **_base_.image_ae)
