"""Training runs of several processes beside those of one: weights, averages, and going on elsewhere."""

import pprint
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from opensora.acceleration.parallel_context import ParallelContext, Sizes
from opensora.acceleration.plugins import NATIVE
from opensora.config import parse_config
from opensora.config.commands import TrainOptions
from opensora.registry import MODELS, build_module
from opensora.training.checkpoint.folder import load_weights
from opensora.training.diffusion.memory import Trained, held, in_host
from opensora.training.diffusion.trainer import Trainer
from opensora.training.report.metrics import Mean, MetricLog, Rate
from opensora.training.roles import Role
from opensora.training.weights.adapters import TrainedWeights, read_adapter
from opensora.training.weights.ema import EMA
from opensora.utils.errors import UserError
from opensora.utils.video import save_video
from opensora.utils.weights_writing import save_safetensors
from tests.conftest import tiny_inference_config
from tests.integration.own_package import with_page, write_package
from tests.parallel.harness import assert_close


def write_run(folder: Path, **overrides: Any) -> str:
    """Config file of a tiny run on random clips; the first rank writes it, all get its path."""
    if dist.get_rank() == 0 and not (folder / "train.py").exists():
        tiny_run(folder, **overrides)
    dist.barrier()
    return str(folder / "train.py")


def tiny_run(folder: Path, **overrides: Any) -> Path:
    """Write the config file ``train.py`` of a tiny run and its random clips into a folder."""
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        clip = save_video(rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", fps=8)
        rows.append(dict(path=str(clip), text=f"clip {i}", num_frames=9, height=32, width=32, fps=8.0))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    tiny = tiny_inference_config()
    content = dict(
        {key: tiny[key] for key in ("model", "ae", "t5", "clip")},
        device="cpu",
        dtype="fp32",
        seed=3,
        outputs=str(folder),
        dataset=dict(type="video_text", data_path=str(folder / "clips.csv"), fps_max=24),
        bucket_config={"32px_ar1:1": {9: (1.0, 2)}},
        num_workers=0,
        optim=dict(cls="AdamW", lr=1e-3, eps=1e-4),
        ema_decay=0.9,
        grad_clip=1.0,
        condition_config={"t2v": 1, "i2v_head": 1},
        dropout_ratio=dict(t5=0.3, clip=0.3),
        is_causal_vae=True,
        plugin="none",
        max_steps=3,
        ckpt_every=0,
    )
    content |= overrides
    path = folder / "train.py"
    path.write_text("\n".join(f"{key} = {pprint.pformat(value)}" for key, value in content.items()))
    return path


def run(config: str, words: Sequence[Any], world_size: int = 2) -> Path:
    """One command line on this many processes; a single one is the first rank, while the others wait."""
    torch.manual_seed(0)  # of the tiny autoencoder's random weights
    folder = None
    if world_size > 1 or dist.get_rank() == 0:
        folder = Trainer(parse_config([config, *map(str, words)], TrainOptions), 0, world_size).run()
    box = [folder]
    dist.broadcast_object_list(box, 0)
    assert box[0] is not None
    return box[0]


def read_adapter_of(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    return read_adapter(checkpoint / name)


def compare(
    found: Path, expected: Path, step: int, limit: float = 1e-5, names: Sequence[str] = ("model", "ema")
) -> None:
    """Weights and averages of two runs."""
    if dist.get_rank():
        return
    for name in names:
        read = read_adapter_of if name.startswith("lora") else load_weights
        a, b = (read(next(run.glob(f"epoch*-global_step{step}")), name) for run in (found, expected))
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert_close(a[key].float(), value.float(), f"{found.name} {name} {key}", limit)


def layouts(folder: Path) -> None:
    """A run that goes on in another layout is that of one process: tensor parallel, then sequence parallel."""
    config = write_run(folder)
    alone = run(config, ["--exp-name", "alone"], world_size=1)
    words = ["--exp-name", "tp", "--plugin", "ddp", "--plugin_config.tp_size", 2, "--max-steps", 1]
    tp = run(config, [*words, "--ckpt-shard-size-gb", 2e-5, "--async-io", True])
    half = next(tp.glob("epoch*-global_step1"))
    assert len(list((half / "optimizer").glob("state-*-of-*.safetensors"))) > 2
    assert run(config, ["--load", half, "--plugin", "fsdp2", "--plugin_config.sp_size", 2]) == tp
    compare(tp, alone, 3)


def booster(folder: Path) -> None:
    """Tensor parallel under ColossalAI, one process, and that again: as in one process; see `checks_colossal`."""
    config = write_run(folder)
    alone = run(config, ["--exp-name", "alone"], world_size=1)
    words = ["--plugin", "hybrid", "--plugin_config.tp_size", 2]
    tp = run(config, ["--exp-name", "tp", *words, "--max-steps", 1])
    for step, more, size in ((1, ["--max-steps", 2], 1), (2, words, 2)):
        assert run(config, ["--load", next(tp.glob(f"epoch*-global_step{step}")), *more], size) == tp
    compare(tp, alone, 3)


def data_parallel(folder: Path) -> None:
    """Both engines agree, and one process goes on where two stopped in the data."""
    config = write_run(folder)
    two = run(config, ["--exp-name", "two", "--plugin", "ddp", "--max-steps", 1])
    again = run(config, ["--exp-name", "again", "--plugin", "fsdp2", "--max-steps", 1])
    compare(again, two, 1)
    one = run(config, ["--load", next(two.glob("epoch*-global_step1")), "--max-steps", 2], world_size=1)
    if dist.get_rank() == 0:
        assert '"micro_step": 3' in (next(one.glob("epoch*-global_step2")) / "running_states.json").read_text()


def curves(folder: Path) -> None:
    """Means over both processes' samples; one metric that only one of them has; rates of the run and per device."""
    context = ParallelContext.create(Sizes())
    rank, shown = context.rank, []
    tracker = SimpleNamespace(scalars=lambda values, step: shown.append(values), close=lambda: None)
    log = MetricLog(folder, 1, trackers=[tracker], parallel=context)
    log.add({"loss": 1.0 + rank, "tokens": Rate(100 * (rank + 1)), "tflops": Rate(3.0 + rank, per_device=True)})
    log.add({"loss_time": Mean(6.0, 2) if rank else Mean(0.0, 0), f"loss_bucket/{rank}": 5.0, "data_seconds": 0.0})
    log.step_done(1, 0.1)
    log.close()
    (values,) = shown
    seconds = values["seconds_per_step"]
    assert (values["loss"], values["loss_time"]) == (1.5, 3.0)
    assert values["loss_bucket/0"] == values["loss_bucket/1"] == 5.0
    assert values["tokens_per_s"] * seconds == pytest.approx(300)
    assert values["tflops_per_s"] * seconds == pytest.approx(3.5)
    memory: list[Any] = [None, None]
    dist.all_gather_object(memory, values["memory_gib"])
    assert memory[0] == memory[1] > 0


def bfloat16(folder: Path) -> None:
    """fp32 weights are kept, saved, and gone on with under another engine."""
    config = write_run(folder)
    words = ["--dtype", "bf16", "--plugin_config.sp_size", 2, "--save-master-weights", True]
    fsdp2 = run(config, [*words, "--exp-name", "fsdp2", "--plugin", "fsdp2", "--max-steps", 1])
    saved = next(fsdp2.glob("epoch*-global_step1"))
    run(config, [*words, "--load", saved, "--plugin", "ddp", "--max-steps", 2])
    if dist.get_rank() == 0:
        for folder in fsdp2.glob("epoch*"):
            model, master = (load_weights(folder, name) for name in ("model", "master"))
            assert {value.dtype for value in model.values()} == {torch.bfloat16}
            assert all(torch.equal(master[name].bfloat16(), value) for name, value in model.items())


def adapters(folder: Path) -> None:
    """On quantised weights, divided or not: those of one process; an fp32 run goes on under another engine."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        section = tiny_inference_config()["model"]
        save_safetensors(build_module(section, MODELS).state_dict(), folder / "start.safetensors")
        lora = dict(r=2, lora_alpha=4, target_modules=["q_proj", "linear2", "img_mlp.0"], use_dora=True)
        model = {**section, "from_pretrained": str(folder / "start.safetensors"), "quantize": "nf4"}
        tiny_run(folder, model=model, lora_config=lora)
    dist.barrier()
    config, names = str(folder / "train.py"), ("lora", "lora_ema")
    ddp = run(config, ["--exp-name", "ddp", "--plugin", "ddp"])
    fsdp2 = run(config, ["--exp-name", "fsdp2", "--plugin", "fsdp2", "--max-steps", 1])
    assert run(config, ["--load", fsdp2, "--plugin", "fsdp2", "--max-steps", 2]) == fsdp2
    assert run(config, ["--load", fsdp2, "--plugin", "ddp"]) == fsdp2
    compare(fsdp2, ddp, 3, names=names)
    # adapters in bf16: fsdp2 rounds as it gathers, ddp after each update; fp8 weights are divided too
    words = ["--dtype", "bf16", "--max-steps", 2, "--lora-dtype"]
    two = [run(config, [*words, "bf16", "--model.quantize", "int8", "--exp-name", f"{name}16", "--plugin", name])
           for name in NATIVE]  # fmt: skip
    compare(*two, step=2, limit=0.05, names=names)
    run(config, [*words, "fp32", "--model.quantize", "fp8", "--exp-name", "fp8", "--plugin", "fsdp2"])
    for more, message in (
        (["--plugin", "zero2"], "--plugin ddp"),
        (["--plugin", "fsdp2", "--dtype", "bf16", "--lora-dtype", "bf16", "--model.quantize", "fp8"], "int8 or nf4"),
        (["--plugin", "fsdp2", "--training_method", "dmd"], "adds an adapter"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(parse_config([config, *map(str, more)], TrainOptions), 0, 2)


class Counting(Trainer):
    """A trainer that counts the bytes it holds, by part."""

    def _role(self, weights: TrainedWeights) -> Role:
        role = super()._role(weights)
        self.parts = {"weights": 0.0, "masters": 0.0, "gradients": 0.0, "states": 0.0, "ema": 0.0}
        copies = [] if weights.masters is None else [*weights.masters.state_dict().values()]
        divided = self.cfg.plugin == "fsdp2"
        for parameter in weights.model.parameters():
            self.parts["masters" if divided and parameter.requires_grad else "weights"] += local_bytes([parameter])
        in_host = self.cfg.optim.states == "host"
        self.host = {"masters": local_bytes(copies)} if in_host and copies else {}
        self.parts["masters"] += 0.0 if in_host else local_bytes(copies)

        def before(optimizer: Any, *_: Any) -> None:
            held = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self.parts["gradients"] = local_bytes(held)

        def after(optimizer: Any, *_: Any) -> None:
            states = local_bytes([x for state in optimizer.state.values() for x in state.values()])
            (self.host if in_host else self.parts)["states"] = states

        role.engine.optimizer.register_step_pre_hook(before)
        role.engine.optimizer.register_step_post_hook(after)
        return role

    def _ema(self, weights: TrainedWeights, engine: Any) -> EMA | None:
        ema = super()._ema(weights, engine)
        size = local_bytes(ema.shadow.values()) if ema is not None else 0.0
        (self.host if "masters" in self.host else self.parts)["ema"] = size
        return ema


def local_bytes(tensors: Any) -> float:
    """Of what this rank holds of tensors."""
    own = [x.to_local() if isinstance(x, DTensor) else x for x in tensors if isinstance(x, torch.Tensor)]
    return float(sum(x.numel() * x.element_size() for x in own))


def count_memory(folder: Path, cases: dict[str, list[str]]) -> None:
    """Bytes that ranks hold are those of the table that a dry run prints."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        section = {**tiny_inference_config()["model"], "hidden_size": 64, "axes_dim": [8, 12, 12]}
        save_safetensors(build_module(section, MODELS).state_dict(), folder / "start.safetensors")
        tiny_run(folder, model={**section, "from_pretrained": str(folder / "start.safetensors")}, max_steps=1)
    dist.barrier()
    for name, words in cases.items():
        size = 1 if name.startswith("alone") else dist.get_world_size()
        if size == 1 and dist.get_rank():
            continue
        config = [str(folder / "train.py"), "--exp-name", name, *words]
        trainer = Counting(parse_config(config, TrainOptions), 0, size)
        trainer.run()
        trained = Trained.of(trainer.cfg, trainer.plan.model)
        expected = held(trainer.cfg, trained, size)
        assert trainer.host == pytest.approx(in_host(trainer.cfg, trained, size), rel=0.1), name
        for part, count in trainer.parts.items():
            assert count == pytest.approx(expected[part], rel=0.1), (name, part, trainer.parts, expected)


def memory(folder: Path) -> None:
    adapters = "{'r': 2, 'lora_alpha': 4, 'target_modules': ['q_proj', 'linear2']}"
    lora = ["--lora_config", adapters, "--dtype", "bf16"]
    count_memory(folder, {
        "alone": ["--dtype", "bf16", "--optim.cls", "Muon"],
        "alone_host": ["--dtype", "bf16", "--optim.states", "host"],
        "ddp": ["--plugin", "ddp"],
        "ddp16": ["--plugin", "ddp", "--dtype", "bf16"],
        "fsdp2": ["--plugin", "fsdp2", "--dtype", "bf16"],
        "fsdp2_8bits": ["--plugin", "fsdp2", "--optim.cls", "AdamW8bit", "--accumulation_steps", "2"],
        "fsdp2_host": ["--plugin", "fsdp2", "--optim.states", "host"],
        "ddp_lora": ["--plugin", "ddp", "--model.quantize", "int8", "--lora-dtype", "bf16", *lora],
        "fsdp2_lora": ["--plugin", "fsdp2", "--model.quantize", "nf4", *lora],
    })  # fmt: skip


def memory_of_four(folder: Path) -> None:
    count_memory(folder, {
        "fsdp2": ["--plugin", "fsdp2"],
        "hsdp": ["--plugin", "fsdp2", "--plugin_config.shard_size", "2"],
    })  # fmt: skip


def refusals(folder: Path) -> None:
    config = write_run(folder)
    for words, message in (
        (["--plugin", "none"], "fsdp2"),
        (["--plugin", "fsdp3"], "fsdp2"),
        (["--plugin", "zero2", "--optim.cls", "Muon"], "or --optim.cls AdamW"),
        (["--plugin", "zero2", "--plugin_config.sp_size", 2], "hybrid"),
        (
            ["--plugin", "ddp", "--plugin_config.tp_size", 2, "--model.num_heads", 1, "--model.axes_dim", "[8,12,12]"],
            "tp",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(parse_config([config, *map(str, words)], TrainOptions), 0, 2)


def own_types(folder: Path) -> None:
    """What a package of a user's own adds, diffusion model included, trains under both engines alike."""
    if dist.get_rank() == 0:
        write_package(folder)
        small = {"dataset": {"type": "moving_bars", "count": 8, "side": 32}, "num_workers": 1}
        config = tiny_run(folder, **{**with_page({}, "train.py"), **small})
        keys = ("in_channels", "vec_in_dim", "context_in_dim", "cond_embed")
        model = {"type": "plain_transformer", **{key: tiny_inference_config()["model"][key] for key in keys}}
        (folder / "own_model.py").write_text(f"_base_ = [{str(config)!r}]\nmodel = dict(_delete_=True, **{model!r})\n")
    dist.barrier()
    words = ("--max-steps", 1, "--plugin")
    compare(*(run(str(folder / "own_model.py"), [*words, name, "--exp-name", name]) for name in NATIVE), step=1)


def distillation(folder: Path) -> None:
    """Student and fake score of two processes that share their samples are those of one; both engines agree."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        section = tiny_inference_config()["model"]
        save_safetensors(build_module(section, MODELS).state_dict(), folder / "start.safetensors")
        method = {"num_steps": 2, "fake_updates": 2, "fake_optim": {"cls": "AdamW", "lr": 1e-3, "eps": 1e-4}}
        model = {**section, "from_pretrained": str(folder / "start.safetensors")}
        tiny_run(folder, model=model, training_method="dmd", training_method_config=method)
    dist.barrier()
    config = str(folder / "train.py")
    alone = run(config, ["--exp-name", "alone"], world_size=1)
    divided = run(config, ["--exp-name", "divided", "--plugin", "fsdp2", "--plugin_config.sp_size", 2])
    compare(divided, alone, 3, names=("model", "ema", "fake"))
    engines = (run(config, ["--exp-name", name, "--plugin", name, "--max-steps", 2]) for name in NATIVE)
    compare(*engines, step=2, names=("model", "fake"))


CHECKS = [layouts, data_parallel, curves, bfloat16, adapters, memory, refusals, own_types, distillation]
