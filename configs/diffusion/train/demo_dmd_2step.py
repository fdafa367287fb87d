# The small model in two steps by DMD2, from its own weights, or from the student of four steps: --model.from_pretrained.
_base_ = ["demo_dmd.py"]

training_method_config = dict(num_steps=2, positions=[1, 0.59375, 0])
