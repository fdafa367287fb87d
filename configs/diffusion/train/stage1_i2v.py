# Open-Sora 2.0, stage 1 with images: the first frame, the last one or both may be given.
_base_ = ["stage1.py"]

model = dict(cond_embed=True)
condition_config = dict(t2v=1, i2v_head=5, i2v_loop=1, i2v_tail=1)  # relative weights

lr = 1e-5
optim = dict(lr=lr)
