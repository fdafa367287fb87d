# Open-Sora 2.0, 11B: a flux picture from the prompt, then video at 256px from that picture.
_base_ = ["256px.py", "plugins/t2i2v.py"]
