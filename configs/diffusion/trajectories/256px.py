# Trajectories of the 11B model at 256px, 129 frames, for students of 8, 4, 2 or 1 steps: give captions and clips with
# --dataset.data-path (columns text and path), and start it once per GPU (opensora trajectories ... --nproc 8). 48 steps
# with the guidance of 256px.py, of which every sixth state is kept: 14 MB each, 5,000 of them 70 GB.
_base_ = ["../inference/256px.py"]
save_dir = "outputs/trajectories_256px"
condition_config = dict(t2v=1, i2v_head=1)
sampling_option = dict(num_steps=48, num_frames=129)
keep_every = 6
shard_size = 8
