"""Everything in the batch that depends on the kind of device. The CUDA half has never run on a GPU.

On a CPU, kernels run as they are called, and attention covers as many places of the KV cache as the longest speech
needs, which changes no bit of a shorter one. On CUDA a step is recorded as a CUDA graph, because its kernels are
shorter than their launches; its shapes are fixed, so attention covers all places.
"""

from collections.abc import Callable

import torch

#: Places of the KV cache are attended to in multiples of this, on a CPU.
BUCKET_PLACES = 128
#: Runs before a recording, in which libraries allocate what they need.
_RUNS_BEFORE = 3


def bind_thread(device: str) -> None:
    """Make `device` the one that this thread uses: CUDA's current device belongs to a thread."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def places_in_use(device: str, longest: int, places: int) -> int:
    """How many places of the KV cache a step attends to, if the longest speech has `longest`."""
    if device.startswith("cuda"):
        return places
    return min(places, -(-longest // BUCKET_PLACES) * BUCKET_PLACES)


def attention_name(device: str) -> str:
    """Which attention this is, for the fingerprint: samples of different ones differ in rounding."""
    return "grouped" if device.startswith("cuda") else "gqa"


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of one token of each row.

    Args:
        query: (rows, heads, 1, size).
        keys, values: (rows, key heads, places, size).
        mask: bool (rows, 1, 1, places), true where to attend.

    Returns:
        (rows, heads, 1, size).
    """
    if query.is_cuda:
        return attend_grouped(query, keys, values, mask)
    # The call of the package (`MiniCPMAttention.forward_step`): one row has its very bits.
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys.contiguous(), values.contiguous(), attn_mask=mask, enable_gqa=True
    )


def attend_grouped(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same in another order, for CUDA: with `enable_gqa` and a mask it writes all scores to memory.

    The query heads that share a key head are as good as so many tokens of it, for which there is a fused kernel.
    """
    rows, heads, _, size = query.shape
    grouped = query.view(rows, keys.size(1), heads // keys.size(1), size)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(rows, heads, 1, size)


def recorded(call: Callable[[], None], device: str, *, record: bool) -> Callable[[], None]:
    """`call` as a CUDA graph on CUDA, if `record`; else as it is.

    Args:
        call: reads and writes only tensors that stay where they are, and draws no random numbers.
        device: where it runs.
        record: whether to record it.
    """
    if not record or not device.startswith("cuda"):
        return call
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_RUNS_BEFORE):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
