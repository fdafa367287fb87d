# Small twin of ../256px_tp.py: one process on one device leaves the parallel plugin aside.
_base_ = ["256px.py", "../plugins/tp.py"]
