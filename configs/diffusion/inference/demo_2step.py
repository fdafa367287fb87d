# The small model in two steps, one forward each: its weights say so themselves. Recipe and figures:
# assets/demo/README.md.
_base_ = ["demo.py"]
model = dict(from_pretrained="assets/demo/mmdit_2step.safetensors")
