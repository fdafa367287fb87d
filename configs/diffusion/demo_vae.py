# The small causal video VAE: the layouts that training, sampling and measuring share. They are variables, each config
# says which of its sections they are.
vae_as_trained = dict(
    type="hunyuan_vae",
    block_out_channels=(8, 16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=4,
)
# What comes with the repository has a decoder that was widened afterwards (tools/convert/widen_decoder.py).
vae_in_use = dict(
    from_pretrained="assets/demo/vae.safetensors", decoder_block_out_channels=(16, 32, 64, 96), **vae_as_trained
)
