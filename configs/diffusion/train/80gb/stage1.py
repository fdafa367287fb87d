# Stage 1 on 8 x 80 GB: weights, gradients and optimizer divided over the eight (fsdp2), every block recomputed.
#
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py configs/diffusion/train/80gb/stage1.py
#
# On several machines add --plugin_config.shard_size 8. --dry-run True prints where the memory goes.
_base_ = ["../stage1.py"]

model = dict(grad_ckpt_settings=(100, 100))
plugin = "fsdp2"
plugin_config = dict(_delete_=True)
pin_memory_cache_pre_alloc_numels = None
async_io = True
dry_run_ranks = 8
