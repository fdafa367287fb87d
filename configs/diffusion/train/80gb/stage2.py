# Stage 2 on 8 x 80 GB: weights divided over the eight (fsdp2), tokens of a video over four, every block recomputed. What
# fills the memory is the autoencoder; from a cache of latents (cached_video=True) batches may be those of stage2.py.
_base_ = ["../stage2.py"]

bucket_config = {
    "_delete_": True,
    "256px": {
        1: (1.0, 130),
        **{frames: (1.0, 14) for frames in range(5, 34, 4)},
        **{frames: (1.0, 6) for frames in range(37, 66, 4)},
        **{frames: (1.0, 4) for frames in range(69, 98, 4)},
        **{frames: (1.0, 3) for frames in range(101, 130, 4)},
    },
    "768px": {
        1: (1.0, 38),
        **{frames: (1.0, 4) for frames in range(5, 34, 4)},
        **{frames: (1.0, 2) for frames in range(37, 66, 4)},
        **{frames: (1.0, 1) for frames in range(69, 130, 4)},
    },
}
plugin = "fsdp2"
plugin_config = dict(_delete_=True, sp_size=4, sequence_parallelism_mode="all_to_all")
pin_memory_cache_pre_alloc_numels = None
async_io = True
dry_run_ranks = 8
