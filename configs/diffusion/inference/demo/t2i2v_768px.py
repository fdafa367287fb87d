# Small twin of ../t2i2v_768px.py. The image models have random weights: the picture is noise, the way to it is real.
_base_ = ["768px.py", "plugins/t2i2v.py"]
