# Open-Sora 2.0, 11B: video at 256px; the weights are split over up to 8 devices.
_base_ = ["256px.py", "plugins/tp.py"]
