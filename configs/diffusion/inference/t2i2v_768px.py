# Open-Sora 2.0, 11B: a flux picture from the prompt, then video at 768px from that picture, on up to 8 devices.
_base_ = ["768px.py", "plugins/t2i2v.py"]
