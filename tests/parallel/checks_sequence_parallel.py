"""Sequence parallelism beside one process: outputs and gradients."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opensora.acceleration.ring import block_kernels, math_backward, math_forward
from opensora.acceleration.sequence_parallel import RingAttention, UlyssesAttention, apply_sequence_parallel
from opensora.diffusion.first_block import FirstBlockCache
from opensora.utils.errors import UserError
from tests.parallel.harness import assert_close
from tests.parallel.tiny import context, loss_of, mean_over, tiny_inputs, tiny_model

LENGTHS = ((13, 5), (8, 4), (3, 1))  # image and text tokens; some ranks have nothing but fillers


def compare(mode: str, inputs: dict[str, Tensor], limit: float = 1e-5, **model_options) -> None:
    """Output, gradients of parameters and of inputs against one process."""
    axis = context(sp=dist.get_world_size()).sp
    dtype = inputs["img"].dtype
    alone = tiny_model(dtype, **model_options).train()
    shared = apply_sequence_parallel(copy.deepcopy(alone), axis, mode)
    assert shared.state_dict().keys() == alone.state_dict().keys()
    grads = []
    for model in (alone, shared):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k in ("img", "txt", "y_vec", "cond")}
        given = {**inputs, **leaves}
        if model is alone:
            with torch.no_grad():
                outputs = [net(**given).float() for net in (alone, shared)]
            assert_close(outputs[1], outputs[0], "output", limit)
        loss_of(model, given).backward()
        named = [*model.named_parameters(), *leaves.items()]
        grads.append({name: leaf.grad.float() for name, leaf in named})
    for name, expected in grads[0].items():
        assert_close(mean_over(grads[1][name], axis.group), expected, name, limit)


def check_ulysses(folder: Path) -> None:
    for image, text in LENGTHS:
        compare("all_to_all", tiny_inputs(image, text))


def check_ring(folder: Path) -> None:
    for image, text in LENGTHS:
        compare("ring_attn", tiny_inputs(image, text))
    compare("ring_attn", tiny_inputs(), attn_backend="math")


def check_layouts(folder: Path) -> None:
    """Fused projections, interleaved rotary layout, no condition; and recomputed blocks."""
    for mode in ("all_to_all", "ring_attn"):
        compare(mode, tiny_inputs(), fused_qkv=True, use_liger_rope=False, grad_ckpt_settings=(1, 1))


def check_around_blocks(folder: Path) -> None:
    """What is put around the blocks gets this rank's tokens, and may run some of the rows."""
    axis, inputs = context(sp=dist.get_world_size()).sp, tiny_inputs()

    def by_row(run, img, txt, vec, rope):
        assert img.shape[1] < inputs["img"].shape[1]
        rows = [slice(0, 1), slice(1, None)]
        return torch.cat([run(img[row], txt[row], vec[row], type(rope)(*(x[row] for x in rope))) for row in rows])

    with torch.no_grad():
        for mode in ("all_to_all", "ring_attn"):
            shared = apply_sequence_parallel(tiny_model(), axis, mode)
            assert_close(shared(**inputs, around=by_row), tiny_model()(**inputs), mode)


def check_step_cache(folder: Path) -> None:
    """Ranks that hold different tokens, some of them fillers, leave out what one process leaves out."""
    axis, start = context(sp=dist.get_world_size()).sp, tiny_inputs()
    for mode in ("all_to_all", "ring_attn"):
        outputs, reused = [], []
        for model in (tiny_model(depth=2), apply_sequence_parallel(tiny_model(depth=2), axis, mode)):
            cache, made = FirstBlockCache(9, threshold=0.1), []
            for step in range(9):
                moved = {"img": start["img"] * torch.tensor([1 + 0.1 * step, 1 + 0.3 * step])[:, None, None]}
                around = partial(cache.around_blocks, branch=("prompt",), step=step)
                with torch.no_grad():
                    made.append(model(**{**start, **moved}, around=around))
            outputs.append(torch.stack(made))
            reused.append(cache.reused)
        assert_close(outputs[1], outputs[0], mode)
        assert reused[0] == reused[1]
        assert 0 < reused[0][1] < reused[0][0] < 7, "some evaluations of each row, and not the same"


def check_bfloat16(folder: Path) -> None:
    for mode in ("all_to_all", "ring_attn"):
        compare(mode, tiny_inputs(dtype=torch.bfloat16), limit=3e-2)


def check_recompute_after_another_forward(folder: Path) -> None:
    """Blocks recompute under the token count of their own forward."""
    axis = context(sp=dist.get_world_size()).sp
    for mode in ("all_to_all", "ring_attn"):
        alone = tiny_model(grad_ckpt_settings=(1, 2)).train()
        shared = apply_sequence_parallel(copy.deepcopy(alone), axis, mode)
        for model in (alone, shared):
            losses = [loss_of(model, tiny_inputs(image, text)) for image, text in ((13, 5), (6, 2))]
            sum(losses).backward()
        for (name, parameter), other in zip(alone.named_parameters(), shared.parameters()):
            assert_close(mean_over(other.grad, axis.group), parameter.grad, f"{mode} {name}")


def check_heads(folder: Path) -> None:
    """Three heads cannot be divided by all_to_all; the message offers the ring, which takes them."""
    axis = context(sp=dist.get_world_size()).sp
    options = dict(num_heads=3, hidden_size=24)
    with pytest.raises(UserError, match="ring_attn"):
        apply_sequence_parallel(tiny_model(**options), axis, "all_to_all")
    compare("ring_attn", tiny_inputs(), **options)


def check_auto(folder: Path) -> None:
    """Without a mode, heads are divided where they can be; otherwise keys and values go around."""
    axis = context(sp=dist.get_world_size()).sp
    for options, kind in (({}, UlyssesAttention), (dict(num_heads=3, hidden_size=24), RingAttention)):
        for mode in (None, "auto"):
            shared = apply_sequence_parallel(tiny_model(**options), axis, mode)
            found = {type(module.attention) for module in shared.modules() if hasattr(module, "attention")}
            assert found == {kind}
        compare("auto", tiny_inputs(), **options)
    # what counts is the heads of this rank's weights
    assert type(apply_sequence_parallel(tiny_model(), axis, heads=1).double_blocks[0].attention) is RingAttention


def check_block_kernels(folder: Path) -> None:
    """The flash kernel of a block equals the written-out one, output, log-sum-exp and gradients."""
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 3, 7, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 3, 5, 16, generator=generator) for _ in range(2))
    forward, backward = block_kernels(q)
    assert forward is not math_forward
    (fast, _), (plain, _) = forward(q, k, v), math_forward(q, k, v)
    assert_close(fast.out, plain.out)
    assert_close(fast.lse, plain.lse)
    for a, b in zip(
        backward(grad, q, k, v, fast.out, fast.lse, None), math_backward(grad, q, k, v, plain.out, plain.lse, None)
    ):
        assert_close(a, b)


CHECKS = [
    check_ulysses,
    check_ring,
    check_layouts,
    check_around_blocks,
    check_step_cache,
    check_bfloat16,
    check_recompute_after_another_forward,
    check_heads,
    check_auto,
    check_block_kernels,
]
FOUR = [check_ulysses, check_ring]
