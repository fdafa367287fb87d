# Small twin of ../768px.py, at 96px; the model was trained on 64px and draws larger frames badly.
_base_ = ["256px.py", "../plugins/sp.py"]

sampling_option = dict(resolution="96px")
