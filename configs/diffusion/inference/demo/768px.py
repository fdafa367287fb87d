# Small twin of ../768px.py, at 64px like that of ../256px.py: the one size that the model was trained on and draws well.
_base_ = ["256px.py", "../plugins/sp.py"]
