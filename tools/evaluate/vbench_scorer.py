"""Score one dimension of VBench. Runs in the environment that VBench is installed in, and imports nothing else.

``main`` takes a JSON text: suite, info (list of prompts), videos (folder), out (folder), dimension, device and, for
VBench-I2V, ratio. VBench writes ``<out>/<dimension>_eval_results.json``: the score, then that of every video.
"""

import json


def main(text: str) -> None:
    """Score; VBench's own classes do all of it."""
    task = json.loads(text)
    options = {"imaging_quality_preprocessing_mode": "longer"}  # as its command line has it
    if task["suite"] == "i2v":
        from vbench2_beta_i2v import VBenchI2V as Benchmark

        options["resolution"] = task["ratio"]
    else:
        from vbench import VBench as Benchmark
    benchmark = Benchmark(task["device"], task["info"], task["out"])
    benchmark.evaluate(
        videos_path=task["videos"],
        name=task["dimension"],
        dimension_list=[task["dimension"]],
        local=True,
        read_frame=False,
        mode="vbench_standard",
        **options,
    )
