"""The error budget of the tests, and the exact formulas in float64 that it is measured from.

A result passes where, in each channel, in the max-norm,

    |ours - exact| <= 2 |torch - exact| + tiny

`exact` is computed here in float64 from the very numbers that the op was given; `torch` is the unfused computation in
the dtype at hand. A fused kernel may round in other places than torch, so it gets twice torch's error, but no
hand-picked tolerance that a wrong kernel could hide in. `tiny` covers the channels where torch was lucky (few elements,
all of which happened to round well) and float64, where `exact` itself carries an error of this size:

    tiny = eps(dtype) |exact| + 4 eps(accumulation type) scale

eps(dtype) |exact| is two roundings of the result to its storage type. `scale` is the size of what was added up on the
way (several times |exact| where terms cancel): 4 units in its last place allow for the order of a sum and the roundings
of mean, variance and rsqrt; they are 5e-7 of it in float32. Per channel, because channels differ in size by orders of
magnitude, and a wrong small one must not hide behind a large one. The max-norm, because one wrong element is a bug.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
STORAGE_ULPS = 1.0
ACCUMULATION_ULPS = 4.0


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(t: Tensor) -> Tensor:
    """max |t| over all dimensions but the channels': (C,); a vector is one value per channel already."""
    t = t.detach().double().abs()
    if t.dim() < 2:
        return t
    return t.transpose(0, 1).flatten(1).amax(1) if t.numel() else t.new_zeros(t.shape[1])


def over_budget(ours: Tensor, plain: Tensor | None, exact: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """(C,) error / budget, above 1 where `ours` fails; NaN where it is not finite. See the module's docstring."""
    exact = exact.detach().double()
    magnitude = per_channel(exact)
    if scale is None:
        scale = magnitude
    tiny = STORAGE_ULPS * torch.finfo(ours.dtype).eps * magnitude
    tiny = tiny + ACCUMULATION_ULPS * torch.finfo(accumulation(ours.dtype)).eps * torch.as_tensor(scale).double()
    allowed = 0.0 if plain is None else FACTOR * per_channel(plain.detach().double() - exact)
    error = per_channel(ours.detach().double() - exact)
    return torch.where(error == 0, 0.0, error / (allowed + tiny))


def assert_in_budget(
    name: str, ours: Tensor, plain: Tensor | None, exact: Tensor, scale: Tensor | float | None = None
) -> None:
    """Shape and dtype as torch's (`plain`, None where torch has no such computation), values in the budget."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if plain is not None:
        assert ours.dtype == plain.dtype, f"{name}: {ours.dtype}, torch gives {plain.dtype}"
    used = over_budget(ours, plain, exact, scale)
    bad = ~(used <= 1)  # a NaN is bad
    if bad.any():
        worst = int(torch.nan_to_num(used, nan=torch.inf).argmax())
        error = per_channel(ours.detach().double() - exact.detach().double())[worst].item()
        torchs = None if plain is None else per_channel(plain.double() - exact.double())[worst].item()
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} channels over the error budget; channel {worst}: error "
            f"{error:.3e}, torch's own {torchs}, {used[worst].item():.2f} times the budget"
        )


def columns(vector: Tensor | None, x: Tensor) -> Tensor | None:
    """A (C,) vector in the shape that broadcasts over (N, C, ...)."""
    return None if vector is None else vector.view(1, -1, *[1] * (x.dim() - 2))


def exact_bn_act(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    *,
    training: bool,
    eps: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(bn(x) + residual), mean and biased variance, all in float64 and differentiable by autograd.

    `mask` stands for the ReLU: the elements it lets pass (None: there is no activation). Given by the caller, because
    an element within a rounding error of 0 is rightly on either side, and its gradient is all or nothing.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    if training:
        mean = x.mean(dims)
        var = (x - columns(mean, x)).square().mean(dims)
    y = (x - columns(mean, x)) / (columns(var, x) + eps).sqrt()
    if gamma is not None:
        y = y * columns(gamma, x)
    if beta is not None:
        y = y + columns(beta, x)
    if residual is not None:
        y = y + residual
    return (y if mask is None else torch.where(mask, y, 0.0)), mean, var


def doubled(t: Tensor | None, *, leaf: bool = False) -> Tensor | None:
    """The same numbers in float64, on request as a leaf that wants a gradient."""
    if t is None:
        return None
    t = t.detach().double().clone()
    return t.requires_grad_() if leaf else t


def arrange(t: Tensor, layout: str) -> Tensor:
    """A copy of the same values in another memory layout, without history.

    "nchw"; "channels_last" (5-d: channels_last_3d; 2-d and 3-d: the channel is innermost, for which torch has no name);
    "sliced": every other element of a larger NCHW tensor's last dimension; "sliced_channels": a part of the channels of
    a channels_last tensor; "transposed": the first dimension innermost.
    """
    t = t.detach()
    if layout == "nchw":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    if layout == "sliced":
        larger = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), 1e4)
        larger[..., 1::2] = t
        return larger[..., 1::2]
    if layout == "sliced_channels":
        larger = torch.full_like(t, 1e4).repeat_interleave(2, 1).movedim(1, -1).contiguous().movedim(-1, 1)
        larger[:, : t.shape[1]] = t
        return larger[:, : t.shape[1]]
    if layout == "transposed":
        return t.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
    raise AssertionError(layout)


LAYOUTS = ("nchw", "channels_last", "sliced", "sliced_channels", "transposed")


def memory_format(t: Tensor) -> torch.memory_format:
    """Of a result: channels_last where the tensor is that and not also NCHW."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if last is not None and t.is_contiguous(memory_format=last) and not t.is_contiguous():
        return last
    return torch.contiguous_format


def equal_specials(ours: Tensor, plain: Tensor) -> bool:
    """NaN and Inf (with its sign) at the same places."""
    return (
        torch.equal(ours.isnan(), plain.isnan())
        and torch.equal(ours == torch.inf, plain == torch.inf)
        and (torch.equal(ours == -torch.inf, plain == -torch.inf))
    )


def storages(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def exact_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """conv2d in float64 as a sum over the kernel's taps, differentiable by autograd."""
    batch, _, height, width = x.shape
    outputs, inputs, rows, cols = weight.shape
    out_h = (height + 2 * padding[0] - dilation[0] * (rows - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (cols - 1) - 1) // stride[1] + 1
    padded = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    padded = padded.unflatten(1, (groups, inputs))
    taps = weight.unflatten(0, (groups, outputs // groups))
    y = x.new_zeros(batch, groups, outputs // groups, out_h, out_w)
    for r in range(rows):
        for c in range(cols):
            top, left = r * dilation[0], c * dilation[1]
            window = padded[
                ...,
                top : top + (out_h - 1) * stride[0] + 1 : stride[0],
                left : left + (out_w - 1) * stride[1] + 1 : stride[1],
            ]
            y = y + torch.einsum("ngchw,gkc->ngkhw", window, taps[..., r, c])
    y = y.flatten(1, 2)
    return y if bias is None else y + columns(bias, y)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Where they mean something: of dimensions of more than one element. Torch accumulates gradients so."""
    return all(i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)
