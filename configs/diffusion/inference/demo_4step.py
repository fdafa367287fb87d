# The small model in four steps, one forward each: its weights say so themselves. Recipe and figures:
# assets/demo/README.md.
_base_ = ["demo.py"]
model = dict(from_pretrained="assets/demo/mmdit_4step.safetensors")
