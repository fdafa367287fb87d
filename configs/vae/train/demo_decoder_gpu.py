# The demo autoencoder's decoder, wider than its encoder, in minutes of a GPU. The encoder stays, and so do the latents.
# It goes on from the weights that come with the repository. Those began as a narrow one's, which decoded as before:
#   python tools/convert/widen_decoder.py NARROW WIDE.safetensors --channels 16 32 64 96 --norm-groups 4
_base_ = ["demo_decoder.py"]
model = _base_.vae_in_use
dataset = dict(keep_in_memory=False)
num_workers = 7
bucket_config = {"64px_ar1:1": {17: (1.0, 16), 33: (1.0, 8)}}
vae_loss_config = dict(mse_loss_weight=10.0, object_weight=4.0)

dtype = "bf16"
lr = 5e-4
optim = dict(lr=lr)
lr_scheduler = dict(warmup_steps=200, flat_share=0.3)
ema_decay = 0.999
max_steps = 6000
log_every = 20
ckpt_every = 1000
