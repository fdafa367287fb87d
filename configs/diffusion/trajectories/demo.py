# Trajectories of the small model for students of 8, 4, 2 or 1 steps: 16 steps of second order (as good as 30 of
# Euler's), of which every second state is kept.
_base_ = ["../inference/demo.py"]
save_dir = "outputs/demo_trajectories"
condition_config = dict(t2v=3, i2v_head=2)
sampling_option = dict(num_steps=16, solver="ab2", flow_shift=2.0)
keep_every = 2
batch_size = 32
