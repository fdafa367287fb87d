# The small model with the guidance scales as inputs: one forward a step instead of two, or three with a picture. At the
# states of the teacher's trajectories, see demo_trajectory.py. On a CPU.
_base_ = ["demo_trajectory.py"]

model = dict(guidance_embed=True, guidance_img_embed=True, strict_load=False)  # which the teacher has not
training_method = "guidance_distillation"
training_method_config = dict(
    _delete_=True,
    guidance=3.5,  # to sample with, if nobody says otherwise
    guidance_img=1.5,
    guidance_range=(1.0, 6.0),
    guidance_img_range=(1.0, 3.0),
)

max_steps = 400
