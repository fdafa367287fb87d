"""Models that are divided before they have weights: built on meta, then filled tensor by tensor.

No rank ever holds more than its share and one tensor. From a file each rank reads what it keeps; other weights (drawn
at random, or made by a model's own loading) exist whole on the first rank alone, in host memory, and are sent from
there.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.acceleration import collectives
from opensora.acceleration.parallel_context import ParallelContext
from opensora.acceleration.sharding import WeightLayout, held_of
from opensora.utils.errors import UserError
from opensora.utils.weights import check_finite
from opensora.utils.weights_loading import Change, reset_buffers, stored_weights

Cut = Callable[[str, Tensor], Tensor]


@torch.no_grad()
def materialise(
    model: nn.Module,
    layout: WeightLayout,
    context: ParallelContext,
    build: Callable[[], nn.Module] | None = None,
    change: Change | None = None,
    device: torch.device | None = None,
) -> None:
    """Give a divided model on meta its weights, in place.

    Args:
        model: divided by tensor parallelism (``layout``), by FSDP2, or both.
        layout: see above.
        context: the ranks; all call this.
        build: makes the whole model with its weights, in host memory; needed where no file is known for the model (see
            `opensora.utils.weights_loading.stored_weights`). The first rank alone calls it.
        change: what is done to every whole tensor of a file first.
        device: where the weights go; the context's by default.

    Raises:
        UserError: weights that are not finite; on all ranks, whichever has read them.
    """
    device = device or context.device
    model.to_empty(device=device)
    reset_buffers(model, device, lambda buffer: True)
    own, wrong = model.state_dict(), None
    stored = stored_weights(model)

    def cut(name: str, whole: Tensor) -> Tensor:
        like = own[name]
        changed = whole if change is None else change(name, whole.to(like.dtype))
        return layout.part(name, changed, like)

    parts = stored.tensors(cut) if stored is not None else _sent(build, cut, context)
    for name, part in parts:
        try:
            check_finite(name, part, stored.files.path if stored is not None else "the model")
        except UserError as error:
            wrong = wrong or str(error)
        held_of(own[name]).copy_(part)
        del part
    for message in collectives.gather_values(wrong, context.host):
        if message is not None:
            raise UserError(message)


def _sent(build: Callable[[], nn.Module] | None, cut: Cut, context: ParallelContext) -> Iterator[tuple[str, Tensor]]:
    """Parts of what the first rank has whole, one tensor after the other; and its place in the global random stream,
    which it alone has drawn from."""
    state: dict[str, Tensor] = {}
    if context.rank == 0:
        assert build is not None, "no file is known for the model"
        state = dict(build().state_dict())
    known = {name: (value.shape, value.dtype) for name, value in state.items()}
    known, place = collectives.broadcast_object((known, torch.get_rng_state()), context.host)
    torch.set_rng_state(place)
    for name, (shape, dtype) in known.items():
        whole = torch.empty(shape, dtype=dtype, device=context.device)
        if context.rank == 0:
            whole.copy_(state.pop(name))
        dist.broadcast(whole, 0)
        yield name, cut(name, whole)
        del whole
