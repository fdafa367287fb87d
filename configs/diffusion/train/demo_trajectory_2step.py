# The small model in two steps, from the student of four: --model.from_pretrained outputs/demo_4step/.../ema.safetensors.
_base_ = ["demo_trajectory.py"]

training_method_config = dict(num_steps=2, shares=[1.2, 0.8])
max_steps = 200
