# The model of the Video DC-AE on 8 x 80 GB: weights divided over the eight (fsdp2), every block recomputed.
_base_ = ["../high_compression.py"]

plugin = "fsdp2"
plugin_config = dict(_delete_=True)
pin_memory_cache_pre_alloc_numels = None
async_io = True
dry_run_ranks = 8
