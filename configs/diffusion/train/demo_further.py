# The demo model trained on from its shipped weights; resume, or start again from what came out, as often as you like.
# On a processor with bf16 instructions half as long: --dtype bf16 --save_master_weights True --model.attn_backend math
# --compile True (math because the backward pass of torch's own kernel is slow for so few tokens).
_base_ = ["demo_cpu.py"]
model = dict(from_pretrained="assets/demo/mmdit.safetensors")
warmup_steps = 50
flat_share = 0.5
max_steps = 2600
ckpt_every = 250
