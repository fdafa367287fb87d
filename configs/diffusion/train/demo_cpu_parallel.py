# The small model on several processes (docs/parallel.md): its optimizer works under every plugin, on divided weights too.
_base_ = ["demo_cpu.py"]

optim = dict(cls="AdamW")
plugin = "fsdp2"
