"""Time and memory of our models beside those of diffusers of equal size, measured in one run.

``python tools/benchmark/models.py --device cpu --repeats 5 --out benchmark.json`` prints a table. The implementations
take turns, so that whatever else the machine does hits all of them; the time is the median. On a GPU the released 11B
model and autoencoder are timed as well (with random weights, nothing is downloaded).

``--vae`` measures both video autoencoders instead, in frames per second, whole and in tiles: the released sizes at 256
and 512 px on a GPU, an eighth to a fourth of the channels at 128 px on a CPU (two minutes). ``--size`` and ``--frames``
choose others. It does not need diffusers.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.benchmark.measuring import MIB, in_own_process, markdown, peak_of, seconds_of, tensor_bytes
from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.progress import Bar
from tools.arguments import Bounded
from tools.benchmark.cases import BASELINE, CASES, SIZES, Build, Sizes, diffusers_module
from tools.benchmark.released import released
from tools.benchmark.vae import VAE_SIZES, VaeSizes, autoencoder_rows
from tools.outputs import add_overwrite, check_new


def time_case(builds: Mapping[str, Build], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Times of every implementation of a case, in seconds; they take turns after one run each to warm up."""
    contestants = {name: build(SIZES[device.type], device) for name, build in builds.items()}
    weights = {name: sum(p.numel() for p in c.model.parameters()) for name, c in contestants.items()}
    assert len(set(weights.values())) == 1, f"models of different sizes: {weights}"
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant.run()
    order = list(contestants)
    for _ in range(repeats):
        for name in order:
            times[name].append(seconds_of(contestants[name].run, device))
        order = order[1:] + order[:1]  # nobody always follows the same one
    return times


def measure_peak(case: str, name: str, device: torch.device) -> dict[str, float]:
    """MiB that an implementation needs beyond weights and inputs: the process in its first run, tensors in another."""
    contestant = CASES[case][name](SIZES[device.type], device)
    with peak_of(device) as peak:
        contestant.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = {"peak_mib": peak[0] / MIB}
    return found if device.type == "cuda" else {**found, "tensors_mib": tensor_bytes(contestant.run) / MIB}


def compare(case: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per implementation of a case: all times, their median, peak memory, and ratios to diffusers."""
    builds = CASES[case]
    times = time_case(builds, device, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peaks = {name: in_own_process(measure_peak, case, name, device) for name in builds}
    return [
        {
            "case": case,
            "implementation": name,
            "seconds": times[name],
            "median_s": medians[name],
            "time_ratio": medians[name] / medians[BASELINE],
            **peaks[name],
            **{key.replace("mib", "ratio"): peaks[name][key] / peaks[BASELINE][key] for key in peaks[name]},
        }
        for name in builds
    ]


def environment(device: torch.device, repeats: int, sizes: Sizes | VaeSizes) -> dict[str, Any]:
    """What the figures depend on besides the code; ``sizes`` says what is run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "sizes": {key: str(value) for key, value in vars(sizes).items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--repeats",
        type=int,
        action=Bounded,
        least=5,
        most=10**5,
        default=5,
        help="runs per figure, 5 or more (default: %(default)s)",
    )
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="which (default: all)")
    parser.add_argument("--vae", action="store_true", help="both video autoencoders instead, in frames per second")
    parser.add_argument(
        "--size",
        type=int,
        action=Bounded,
        least=32,
        most=2**14,
        nargs="+",
        help="with --vae: sides of the clips, in px",
    )
    parser.add_argument(
        "--frames", type=int, action=Bounded, least=9, most=10**5, help="with --vae: frames of the clips, at most"
    )
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON; grows with every case")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.out:
        check_new(args.out, args.overwrite)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    device = torch.device(args.device)
    sizes = vae_sizes(args, device) if args.vae else SIZES[device.type]
    report: dict[str, Any] = {"environment": environment(device, args.repeats, sizes)}
    if not args.vae:
        report["environment"]["diffusers"] = diffusers_module().__version__
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items() if key != "sizes"))
    if isinstance(sizes, VaeSizes):
        report["autoencoders"] = []
        for row in Bar(autoencoder_rows(device, sizes, args.repeats), unit="case"):
            report["autoencoders"].append(row)
            save(report, args.out)
        print(markdown(report["autoencoders"]))
        return
    report["comparison"] = []
    for case in Bar(args.case, unit="case"):
        report["comparison"] += compare(case, device, args.repeats)
        save(report, args.out)
    print(markdown(report["comparison"]))
    if device.type == "cuda":
        report["released"] = released(device, args.repeats)
        save(report, args.out)
        print(markdown(report["released"]))


def vae_sizes(args: argparse.Namespace, device: torch.device) -> VaeSizes:
    """The clips of ``--vae``: the device's, or what the command line says."""
    sizes = VAE_SIZES[device.type]
    sides, frames = args.size or sizes.sides, sizes.frames if args.frames is None else args.frames
    if min(sides) < 1 or any(side % 32 for side in sides):
        raise UserError(f"--size {' '.join(map(str, sides))}: multiples of 32")
    if frames < 9:
        raise UserError(f"--frames {frames}: at least 9")
    return replace(sizes, sides=sides, frames=frames)


def save(report: Mapping[str, Any], out: Path | None) -> None:
    """What was measured so far, so that a run that is cut short still leaves figures."""
    if out:
        write_text(json.dumps(report, indent=2) + "\n", out)


if __name__ == "__main__":
    run_main(main)
