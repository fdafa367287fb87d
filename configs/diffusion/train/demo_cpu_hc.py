# A small high-compression pair: a DC-AE of 4 x 32 x 32 and one latent pixel per token. On a CPU; the autoencoder is not
# trained, so this shows that the path works, not what it can reach.
_base_ = ["demo_cpu.py"]

bucket_config = {"_delete_": True, "64px_ar1:1": {1: (1.0, 16), 8: (1.0, 8), 16: (1.0, 4)}}
condition_config = dict(_delete_=True, t2v=1, i2v_head=7)  # relative weights
window = None
patch_size = 1
model = dict(in_channels=16, patch_size=1)
ae = dict(
    _delete_=True,
    type="dc_ae",
    from_scratch=True,
    latent_channels=16,
    encoder=dict(width_list=[16, 16, 32, 32, 32, 32], depth_list=[1, 1, 1, 1, 1, 1]),
    decoder=dict(width_list=[16, 16, 32, 32, 32, 32], depth_list=[1, 1, 1, 1, 1, 1]),
)
is_causal_vae = False
