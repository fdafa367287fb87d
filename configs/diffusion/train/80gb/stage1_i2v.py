# Stage 1 with images on 8 x 80 GB: weights, gradients and optimizer divided (fsdp2), every block recomputed.
_base_ = ["../stage1_i2v.py"]

model = dict(grad_ckpt_settings=(100, 100))
plugin = "fsdp2"
plugin_config = dict(_delete_=True)
pin_memory_cache_pre_alloc_numels = None
async_io = True
dry_run_ranks = 8
