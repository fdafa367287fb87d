"""ColossalAI's engines beside one process."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from opensora.acceleration.colossal import require_colossalai
from opensora.acceleration.engine import Engine
from opensora.acceleration.plugins import create_engine, divide_model
from opensora.acceleration.shardformer import use_shardformer
from opensora.acceleration.tensor_parallel import layout_of
from opensora.config.options import PluginOptions
from opensora.models.text.embedder import HFEmbedder
from opensora.utils.errors import UserError
from tests.conftest import text_encoder
from tests.parallel.checks_engines import (
    MAX_NORM,
    compare,
    expected,
    make_optimizer,
    optimizer_state,
    take_over,
    train,
    weights,
)
from tests.parallel.checks_training import booster
from tests.parallel.harness import assert_close
from tests.parallel.tiny import context, loss_of, tiny_inputs, tiny_model


def import_it() -> None:
    """ColossalAI, which takes seconds."""
    require_colossalai(on_cpu=True)


def zero1(folder: Path) -> None:
    compare("zero1")


def zero2(folder: Path) -> None:
    compare("zero2")


def torch_ddp(folder: Path) -> None:
    compare("torch_ddp")


def hybrid(folder: Path) -> None:
    compare("hybrid", "all_to_all", sp=2)
    compare("hybrid", tp=2)


def booster_divides_by_the_table(folder: Path) -> None:
    """Weights are whole until Booster's policy has divided them, in both layouts of the model; names stay."""
    place = context(tp=2)
    for options in ({}, {"fused_qkv": True, "use_liger_rope": False}):
        whole, model = tiny_model(**options), tiny_model(**options).train()
        layout = divide_model(model, place, engine="hybrid")
        assert [value.shape for value in model.state_dict().values()] == [v.shape for v in whole.state_dict().values()]
        engine = create_engine("hybrid", model, make_optimizer, place, layout=layout)
        divided = {name for name, value in model.state_dict().items() if value.shape != whole.state_dict()[name].shape}
        assert divided == set(layout.splits)
        assert list(model.state_dict()) == list(whole.state_dict())
        loss, expected = (loss_of(m, tiny_inputs()) for m in (engine.model, whole))
        assert_close(loss.detach(), expected.detach(), "loss")
        engine.backward(loss)
        expected.backward()
        for name, parameter in whole.named_parameters():
            found = model.get_parameter(name).grad
            assert_close(layout.whole(name, found), parameter.grad, name)


def shardformer_alone(folder: Path) -> None:
    """The policy without Booster: what Shardformer makes of a model gives one process's output."""
    place = context(tp=2)
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs)
    from colossalai.shardformer import ShardConfig, ShardFormer

    from opensora.acceleration.colossal_policy import policy_of

    policy = policy_of(model, layout_of(model, place.tp))
    ShardFormer(ShardConfig(tensor_parallel_process_group=place.tp.group)).optimize(model, policy)
    assert model.single_blocks[0].linear2.weight.shape[1] == 48
    assert_close(model(**inputs), expected)


def fused_text_encoder(folder: Path) -> None:
    """Its operations in the T5 encoder: the same results, on the same weights, and one line says so."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    texts, logger = ["a red circle moving right", ""], logging.getLogger("opensora.acceleration.shardformer")
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    encoder = HFEmbedder(text_encoder("google/t5-demo", "d_model")[0], max_length=16, shardformer=True)
    expected, places = encoder(texts), {name: value.data_ptr() for name, value in encoder.state_dict().items()}
    assert use_shardformer(encoder)
    torch.testing.assert_close(encoder(texts), expected, rtol=0, atol=1e-5)
    assert {name: value.data_ptr() for name, value in encoder.state_dict().items()} == places
    (line,) = said
    assert "fused" in line


def hybrid_over_four(folder: Path) -> None:
    """Weights times data, and weights times tokens."""
    compare("hybrid", tp=2)
    compare("hybrid", "all_to_all", sp=2, tp=2)


def goes_on_under_fsdp2(folder: Path) -> None:
    """Two steps under ZeRO 1, the third under FSDP2 with sequence parallelism, equal three of one process."""
    norms, whole, _ = expected(1)
    place = context(sp=2)
    saved: list[Any] = [None, None]
    for plugin, first, steps in (("hybrid", 0, 2), ("fsdp2", 2, 1)):
        engine = create_engine(plugin, tiny_model().train(), make_optimizer, place, max_norm=MAX_NORM)
        if first:
            take_over(engine, saved)
        found = train(engine, place, first, steps, 1)
        assert_close(torch.tensor(found), torch.tensor(norms[first : first + steps]), f"{plugin} norms")
        saved = [weights(engine), optimizer_state(engine)]
    for name, value in whole.items():
        assert_close(saved[0][name], value, name)


def bfloat16_masters(folder: Path) -> None:
    """Losses are near those of float32; float32 masters are saved and loaded whole, and resuming is exact."""
    inputs = tiny_inputs(dtype=torch.bfloat16)
    reference = loss_of(tiny_model(), {name: value.float() for name, value in inputs.items()}).detach()

    def engine_of(plugin: str, place: Any) -> Engine:
        return create_engine(
            plugin,
            tiny_model().train(),
            make_optimizer,
            place,
            dtype=torch.bfloat16,
            config=PluginOptions(zero_stage=1),
        )

    def step(engine: Engine) -> Tensor:
        loss = loss_of(engine.model, inputs)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    for plugin, place in (("zero2", context()), ("hybrid", context(sp=2)), ("hybrid", context(tp=2))):
        first: Any = engine_of(plugin, place)
        assert_close(step(first), reference, f"{plugin} loss", limit=3e-2)
        saved = [dict(first.master_state()), optimizer_state(first)]
        assert all(value.dtype == torch.float32 for value in saved[0].values())
        second: Any = engine_of(plugin, place)
        second.load_master_state(saved[0])
        second.load_state_dict(saved[1])
        for engine in (first, second):
            step(engine)
        ends = [dict(engine.master_state()) for engine in (first, second)]
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), f"{plugin} {name}"


def bad_steps_are_skipped(folder: Path) -> None:
    """A gradient that is not finite leaves weights and moments alone."""
    for plugin in ("zero1", "torch_ddp"):
        engine = create_engine(plugin, tiny_model().train(), make_optimizer, context(), max_norm=MAX_NORM)
        LambdaLR(engine.optimizer, lambda step: 1.0)  # schedules wrap the step too
        before = {name: value.clone() for name, value in weights(engine).items()}
        engine.backward(loss_of(engine.model, tiny_inputs()) * float("nan"))
        assert not torch.isfinite(torch.tensor(engine.step()))
        for name, value in weights(engine).items():
            assert torch.equal(value, before[name]), f"{plugin} {name}"


def settings_it_does_not_know(folder: Path) -> None:
    with pytest.raises(UserError, match="no_such_key"):
        create_engine("zero1", tiny_model(), make_optimizer, context(), config=PluginOptions(extra={"no_such_key": 1}))


CHECKS = [
    zero1,
    zero2,
    torch_ddp,
    hybrid,
    booster_divides_by_the_table,
    shardformer_alone,
    goes_on_under_fsdp2,
    bfloat16_masters,
    bad_steps_are_skipped,
    settings_it_does_not_know,
    booster,
    fused_text_encoder,
]
FOUR = [hybrid_over_four]
