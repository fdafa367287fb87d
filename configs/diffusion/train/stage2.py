# Open-Sora 2.0, stage 2: text to video at 768px; the tokens of a video are split over four devices.
_base_ = ["image.py"]

bucket_config = {
    "_delete_": True,
    "256px": {
        1: (1.0, 130),
        **{frames: (1.0, 14) for frames in range(5, 34, 4)},
        **{frames: (1.0, 10) for frames in range(37, 66, 4)},
        **{frames: (1.0, 7) for frames in range(69, 98, 4)},
        **{frames: (1.0, 6) for frames in range(101, 130, 4)},
    },
    "768px": {
        1: (1.0, 38),
        **{frames: (1.0, 6) for frames in range(5, 34, 4)},
        **{frames: (1.0, 4) for frames in range(37, 66, 4)},
        **{frames: (1.0, 3) for frames in range(69, 98, 4)},
        **{frames: (1.0, 2) for frames in range(101, 130, 4)},
    },
}
model = dict(grad_ckpt_settings=(100, 100))  # every block

lr = 5e-5
optim = dict(lr=lr)
plugin = "hybrid"
plugin_config = dict(
    tp_size=1,
    pp_size=1,
    sp_size=4,
    sequence_parallelism_mode="auto",
    enable_sequence_parallelism=True,
    static_graph=True,
    zero_stage=2,
)
ckpt_every = 200
