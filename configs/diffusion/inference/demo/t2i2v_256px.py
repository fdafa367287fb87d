# Small twin of ../t2i2v_256px.py. The image models have random weights: the picture is noise, the way to it is real.
_base_ = ["256px.py", "plugins/t2i2v.py"]
