# The small model that comes with the repository: text or a picture to 64x64 videos of 17 frames, on a CPU in seconds.
_base_ = ["../demo_models.py"]
save_dir = "samples"
seed = 42  # of everything random except a sample's noise, which is sampling_option.seed
batch_size = 1
dtype = "fp32"
cond_type = "t2v"  # or i2v_head with --ref
dataset = dict(type="text")

sampling_option = dict(
    resolution="64px",
    aspect_ratio="1:1",
    num_frames=17,
    window=17,  # longer videos are made in windows of so many frames,
    overlap=9,  # of which so many are those of the window before
    num_steps=50,
    solver="renoise",  # small models drift off on the way that euler takes; fresh noise in each step corrects that
    flow_shift=1.5,
    temporal_reduction=4,
    is_causal_vae=True,
    guidance=1.0,  # its texts say all there is to say: classifier-free guidance only distorts shapes
    guidance_img=1.0,
    text_osci=False,
    image_osci=False,
    scale_temporal_osci=False,
    method="i2v",
    seed=None,
)
fps_save = 8

model = dict(from_pretrained="assets/demo/mmdit.safetensors")
