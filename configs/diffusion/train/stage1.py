# Open-Sora 2.0, stage 1: text to video at 256px, mixed with images at higher resolutions.
_base_ = ["image.py"]

dataset = dict(memory_efficient=False)
bucket_config = {
    "_delete_": True,
    "256px": {
        1: (1.0, 45),
        **{frames: (1.0, 12) for frames in range(5, 34, 4)},
        **{frames: (1.0, 6) for frames in range(37, 66, 4)},
        **{frames: (1.0, 4) for frames in range(69, 98, 4)},
        **{frames: (1.0, 3) for frames in range(101, 130, 4)},
    },
    "768px": {1: (0.5, 13)},
    "1024px": {1: (0.5, 7)},
}
model = dict(grad_ckpt_settings=(8, 100))

lr = 5e-5
optim = dict(lr=lr)
ckpt_every = 2000
