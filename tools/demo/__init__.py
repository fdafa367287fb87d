"""A small world of moving shapes: its clips, its text encoders and the measurement of models trained on it."""
