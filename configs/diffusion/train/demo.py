# The 11B model on batches of one: to see that data, weights and devices are in order before a long run.
_base_ = ["stage1.py"]

bucket_config = {
    "_delete_": True,
    "256px": {1: (1.0, 1), 33: (1.0, 1), 97: (1.0, 1), 129: (1.0, 1)},
}
