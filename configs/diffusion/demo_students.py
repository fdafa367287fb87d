# What the small models of four and of two steps were distilled with, before the model they come from was trained on:
# its text encoders, the scale of its latents, and how it was sampled.
_base_ = ["inference/demo.py"]
sampling_option = dict(num_steps=30, solver="euler", flow_shift=None, guidance=3.5, guidance_img=1.5)
ae = dict(
    scale_factor=[1.4637, 0.9089, 1.3564, 1.2396, 0.8232, 0.6065, 1.3039, 1.4524],
    shift_factor=[0.0384, 0.0350, -0.0204, -0.0257, -0.0317, -0.0576, 0.0036, -0.0117],
)
t5 = dict(from_pretrained="assets/demo/students/google/t5-demo")
clip = dict(from_pretrained="assets/demo/students/openai/clip-demo")
