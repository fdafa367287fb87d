# A small video DC-AE of the released one's compression (4 x 32 x 32) for 64x64 clips, for a CPU: 2 x 2 latents of 32
# channels for 4 frames. On a processor with bf16 instructions in a third of the time: --dtype bf16.
_base_ = ["demo_dc_ae.py", "../../diffusion/demo_hc_models.py"]

image_steps = 1000
image_bucket_config = {"64px_ar1:1": {1: (1.0, 16)}}
bucket_config = {"64px_ar1:1": {16: (1.0, 4)}}
max_steps = 1800
model = _base_.hc_ae
