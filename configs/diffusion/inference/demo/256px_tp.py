# Small twin of ../256px_tp.py: five processes divide its five heads, one on its own leaves the parallel plugin aside.
_base_ = ["256px.py", "../plugins/tp.py"]
