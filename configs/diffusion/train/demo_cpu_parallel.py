# The small model on several processes (docs/parallel.md): its optimizer works under every plugin, on divided weights too.
_base_ = ["demo_cpu.py"]

bucket_config = {"64px_ar1:1": {17: (1.0, 12)}}  # of each group of processes that share samples
optim = dict(cls="AdamW")
plugin = "fsdp2"
