# The demo's causal video VAE against a discriminator: goes on from the weights that come with the repository.
_base_ = ["demo.py"]

model = _base_.vae_in_use
image_steps = 0
max_steps = 600

discriminator = dict(type="N_Layer_discriminator_3D", input_nc=3, ndf=16, n_layers=3, conv_cls="conv3d")
# The discriminator learns alone at first: untrained, it would have nothing to teach.
gen_loss_config = dict(gen_start=100, disc_weight=0.05)
disc_loss_config = dict(disc_start=0, disc_loss_type="hinge")
optim_discriminator = dict(cls="HybridAdam", lr=2e-4, betas=(0.5, 0.98), eps=1e-8, weight_decay=0.0)
disc_lr_scheduler = dict(warmup_steps=50)

lr = 1e-4
optim = dict(lr=lr)
lr_scheduler = dict(warmup_steps=50, cosine=True, flat_share=0.5)
log_every = 25
ckpt_every = 200
