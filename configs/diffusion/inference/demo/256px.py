# Small twin of ../256px.py: its guidance, prompts and conditions at 64px, for a CPU.
_base_ = ["../demo.py"]

sampling_option = dict(
    num_steps=20,
    solver="euler",
    guidance=3.5,
    guidance_img=1.5,
    text_osci=True,
    image_osci=True,
    scale_temporal_osci=True,
)
motion_score = "4"
