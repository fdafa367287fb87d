# Small twin of ../t2i2v_768px.py: a picture by the small image model first, then a video that starts from it.
_base_ = ["768px.py", "plugins/t2i2v.py"]

sampling_option = dict(num_steps=50, solver="renoise")  # of the picture too
