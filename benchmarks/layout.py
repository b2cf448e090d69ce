"""Memory layout and dtype of the frozen image tower: candidates beside what the platform does."""

from __future__ import annotations

import torch

from benchmarks.timing import interleaved
from benchmarks.training import Row
from benchmarks.world import World


@torch.no_grad()
def layout(world: World, batch: int, rounds: int) -> Row:
    """The patch embedding as it is against channels-last, and a frozen pass against one in the other dtype.

    Raises:
        AssertionError: channels-last gives something else.
    """
    images, backbone = world.images(batch), world.backbone
    dtype = torch.bfloat16 if backbone.dtype is torch.float32 else torch.float32
    other = World.make(world.model, "cpu").backbone.to(world.device, dtype)
    patches, pixels = backbone.model.visual.conv1, images.to(backbone.dtype)
    last = torch.nn.Conv2d(3, patches.out_channels, patches.kernel_size, patches.stride, bias=False)
    last.load_state_dict(patches.state_dict())
    last = last.to(world.device, backbone.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rearranged = pixels.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(rearranged), patches(pixels), atol=1e-2, rtol=1e-2)
    seconds = interleaved(
        world.device,
        rounds,
        tower=lambda: backbone.encode_image(images),
        other=lambda: other.encode_image(images),
        patches=lambda: patches(pixels),
        channels_last=lambda: last(rearranged),
        converted=lambda: last(pixels.to(memory_format=torch.channels_last)),
    )
    return {
        "batch": batch,
        "patches_share_of_tower": seconds["patches"] / seconds["tower"],
        "channels_last_speedup": seconds["patches"] / seconds["channels_last"],
        "speedup_with_conversion": seconds["patches"] / seconds["converted"],
        "other_dtype": str(dtype).removeprefix("torch."),
        "other_dtype_speedup": seconds["tower"] / seconds["other"],
    }
