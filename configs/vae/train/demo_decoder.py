# The demo autoencoder's decoder alone, for a few minutes more. Its encoder stays, and so do the latents: a diffusion
# model that was trained on them, and their statistics, stay valid.
_base_ = ["demo.py"]
image_steps = 0
bucket_config = {"64px_ar1:1": {17: (1.0, 2), 33: (1.0, 1)}}
max_steps = 500
freeze_layers = "encoder,quant_conv"
# Squared error counts more, objects less than at first: what is left to win is in the whole picture's noise.
vae_loss_config = dict(mse_loss_weight=10.0, object_weight=1.0)

# Start from a trained one: --model.from_pretrained outputs/demo_vae/epoch1-global_step5000/ema.safetensors
lr = 3e-4
optim = dict(lr=lr)
lr_scheduler = dict(warmup_steps=20, flat_share=0.1)
