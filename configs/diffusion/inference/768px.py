# Open-Sora 2.0, 11B: video at 768px; the tokens of a video are split over up to 8 devices.
_base_ = ["256px.py", "plugins/sp.py"]

sampling_option = dict(resolution="768px")
