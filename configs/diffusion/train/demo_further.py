# The demo model trained on from its shipped weights, on all that a video can start from and on how it goes on; resume, or
# start again from what came out, as often as you like.
# On a processor with bf16 instructions half as long: --dtype bf16 --save_master_weights True --model.attn_backend math
# --compile True (math because the backward pass of torch's own kernel is slow for so few tokens).
_base_ = ["demo_cpu.py"]
model = dict(from_pretrained="assets/demo/mmdit.safetensors")
bucket_config = {"64px_ar1:1": {17: (1.0, 48), 33: (1.0, 48)}}
window = 17  # clips of 33 frames show how a video goes on from any of its latents
# These are encoded beforehand or while training, five times what the clips alone are.
condition_config = dict(
    t2v=6, i2v_head=1.5, i2v_tail=0.5, i2v_loop=0.5, frames=1, region=0.6, extend_left=0.3, extend_right=0.3
)
warmup_steps = 50
flat_share = 0.5
max_steps = 7350
ckpt_every = 250
