"""A whole residual block as one autograd Function: relu(f(x) + shortcut(x)), f a row of conv + BN (+ ReLU) units.

Two forms of the conv whose output joins the shortcut (and of the projection, which is one more of its kind):

- *stored output*: y = conv(a) is stored, its statistics are taken, and one fused pass makes relu(bn(y) + shortcut).
- *Gram form*: its statistics follow from the moments of its input, and all of that is one convolution; the formulas
  stand in `block_units`.

Between the units only raw conv outputs y_k are kept; each rectified a_k is formed again in the backward pass. Here as a
tensor before each conv (*materialised*); in `prologue_block` by each conv that reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_resnet import buffers, dispatch, emulation, foreach
from fused_resnet.folding import accumulate_dtype
from fused_resnet.ops import prologue_block
from fused_resnet.ops.block_units import (
    Plan,
    Spec,
    State,
    Unit,
    as_gradient,
    given_state,
    gram_folded,
    gram_gradients,
    gram_state,
)
from fused_resnet.ops.checks import as_layout, autocast_dtype, check_batch_statistics, check_shape, conv_output_shape
from fused_resnet.ops.conv import conv_backend
from fused_resnet.ops.sync_bn_act import sync_bn_act_backward, sync_bn_act_forward


def residual_block(x: Tensor, units: tuple[Unit, ...], projection: Unit | None, plan: Plan) -> Tensor:
    """relu(f(x) + shortcut) with f = units in a row, ReLU between them; the shortcut is x, or the projection of x.

    Args:
        x: (N, C, H, W), channels_last; float16, bfloat16, float32 or float64, the dtype of all conv weights
            (under autocast any: both are cast as eager torch does).
        units: the convs and BNs of the block in order; a ReLU follows each, the last one after the addition.
        projection: the 1x1 conv and BN of the shortcut, or None for the identity.
        plan: how to run it.

    Returns:
        The block's output, channels_last. Differentiable once. Where units have a group, every process of it must make
        the call, forward and backward; batches may differ in size, an empty one is allowed, and so may the plans.
    """
    every = units if projection is None else (*units, projection)
    dtype = autocast_dtype(x)
    if dtype is not None:
        weights = foreach.cast([u.weight for u in every], dtype)
        x, every = x.to(dtype), tuple(u._replace(weight=w) for u, w in zip(every, weights, strict=True))
    flat = [t for u in every for t in (u.weight, u.gamma, u.beta)]
    spec = Spec(every, projection is not None, plan, dispatch.requested())
    return ResidualBlockFunction.apply(x, spec, *flat)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) channels_last as (N H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _conv(x: Tensor, unit: Unit, backend: str) -> Tensor:
    return dispatch.call("conv_forward", x, unit.weight, None, *unit.geometry, backend=conv_backend(backend))


def _sampled(x: Tensor, unit: Unit) -> Tensor:
    """The pixels of x that a 1x1 conv with a stride reads."""
    if unit.stride == (1, 1):
        return x
    return x[:, :, :: unit.stride[0], :: unit.stride[1]].contiguous(memory_format=torch.channels_last)


def _normalised(
    y: Tensor, unit: Unit, residual: Tensor | None, activation: str | None, backend: str
) -> tuple[Tensor, State]:
    """act(bn(y) + residual), the statistics taken from y or given."""
    if unit.training:
        check_batch_statistics(y.shape, unit.eps, unit.group is not None)
        running = (unit.running_mean, unit.running_var)
        args = (unit.gamma, unit.beta, *running, residual, unit.momentum, unit.eps, activation)
        if unit.group is None:
            out, *statistics = dispatch.call("bn_act_train_forward", y, *args, backend=backend)
        else:
            out, *statistics = sync_bn_act_forward(y, *args, unit.group, backend)
        return out, State(y, *statistics)
    state = State(y, unit.running_mean, unit.running_var)  # type: ignore[arg-type]
    return _again(state, unit, residual, activation, backend), state


def _again(state: State, unit: Unit, residual: Tensor | None, activation: str | None, backend: str) -> Tensor:
    """act(bn(y) + residual) with the statistics that are known."""
    args = (unit.gamma, unit.beta, state.mean, state.var, residual, unit.eps, activation)
    return dispatch.call("bn_act_eval_forward", state.y, *args, backend=backend)


def _gram_forward(
    a: Tensor, unit: Unit, residual: Tensor | None, activation: str | None, backend: str
) -> tuple[Tensor, State] | None:
    """act(bn(conv(a)) + residual) as one convolution; `a` is what the 1x1 conv reads (already sampled).

    None where `a` is empty, or the variances would lose their digits.
    """
    if not a.numel():
        return None
    if not unit.training:
        state = given_state(unit)
    else:
        check_batch_statistics(a.shape, unit.eps, unit.group is not None)
        rows = _rows(a)
        mu, moments = dispatch.call("second_moments", rows, backend=backend)
        found = gram_state(unit, mu, moments, rows.shape[0])
        if found is None:
            return None
        state = found
    folded, shift = gram_folded(unit, state)
    shift = shift.to(a.dtype)
    if a.device.type == "cpu" and not bool(torch.isfinite(shift).all()):
        backend = "reference"  # oneDNN's ReLU would turn NaN into 0 and hide it
    args = (folded, shift, residual, (1, 1), (0, 0), (1, 1), 1, activation)
    return dispatch.call("conv_bias_act_forward", a, *args, backend=backend), state


def _by_convs(g: Tensor, backend: str) -> bool:
    """Whether convolutions, rather than matrix products, are what the products of the Gram form are fastest by."""
    if g.device.type != "cpu":
        return False
    return g.dtype == torch.float32 or dispatch.in_float32(g.dtype, "cpu", backend)


def _gram_backward(
    g: Tensor, s1: Tensor | None, a: Tensor, unit: Unit, state: State, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da, dW, dgamma, dbeta) of bn(conv(a)) in Gram form; s1: the sums of g, where they are known."""
    by_convs = _by_convs(g, backend)
    dtype = a.dtype
    if by_convs:
        g, a = emulation.wide(g), emulation.wide(a)
    g_rows, a_rows = _rows(g), _rows(a)
    if by_convs:
        args = (emulation.wide(unit.weight), None, *_POINTWISE, False, True)
        q = dispatch.call("conv_backward", g, a, *args, backend=conv_backend(backend))[1].flatten(1)
        s1 = g_rows.sum(0) if s1 is None else s1
    else:
        q, s1 = _products(g_rows, a_rows, accumulate_dtype(a.dtype))
    found = gram_gradients(q, s1, g_rows.shape[0], unit, state)
    scaled = found.scaled.to(g.dtype)
    da = None
    if found.square is not None and found.shift is not None:
        square, shift = found.square.to(g.dtype), found.shift.to(g.dtype)
        da = _pointwise(a, square, shift, None, backend) if by_convs else torch.addmm(shift, a_rows, square)
    if by_convs:
        da = _pointwise(g, scaled, None, da, backend)
    else:
        da = _images(g_rows @ scaled if da is None else da.addmm_(g_rows, scaled), a)
    return da.to(dtype), found.weight, found.gamma, found.beta


_POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


def _pointwise(x: Tensor, matrix: Tensor, shift: Tensor | None, onto: Tensor | None, backend: str) -> Tensor:
    """x matrix + shift + onto, x (N, C, H, W) and the matrix (C, K); may be written over `onto`."""
    args = (matrix.t()[:, :, None, None], shift, onto, *_POINTWISE, None)
    choice = dispatch.choose("conv_bias_act_forward", x, *args, backend=conv_backend(backend))
    function = choice.function if onto is None or choice.onto_residual is None else choice.onto_residual
    return function(x, *args)


_CHUNK = 8192


def _products(g: Tensor, a: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """(g^T a, sum(g)) over the rows, in the accumulation type."""
    if g.dtype == acc:
        return g.t() @ a, g.sum(0)
    q, s1 = g.new_zeros(g.shape[1], a.shape[1], dtype=acc), g.new_zeros(g.shape[1], dtype=acc)
    for g_part, a_part in zip(g.split(_CHUNK), a.split(_CHUNK), strict=True):
        wide = g_part.to(acc)
        q.addmm_(wide.t(), a_part.to(acc))
        s1 += wide.sum(0)
    return q, s1


class ResidualBlockFunction(torch.autograd.Function):
    """Keeps x, the block's output, the raw conv outputs (not with "low") and small vectors and matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Spec, *flat: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            prologue = spec.plan.prologue and prologue_block.serves(x)
            spec = spec._replace(plan=spec.plan._replace(prologue=prologue))
            out, states, plan = (prologue_block.forward if prologue else _forward)(x, spec)
        if plan.memory == "low":
            states = [state._replace(y=None) for state in states]
        blank: Any = dict.fromkeys(("weight", "gamma", "beta", "running_mean", "running_var"))
        ctx.buffers = buffers.current()
        ctx.spec = spec._replace(units=tuple(u._replace(**blank) for u in spec.units), plan=plan)
        ctx.save_for_backward(x, out, *flat, *(t for state in states for t in state))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, *saved = ctx.saved_tensors
        count = len(ctx.spec.units)
        units = tuple(
            unit._replace(weight=saved[3 * i], gamma=saved[3 * i + 1], beta=saved[3 * i + 2])
            for i, unit in enumerate(ctx.spec.units)
        )
        saved = saved[3 * count :]
        size = len(State._fields)
        states = [State(*saved[size * i : size * (i + 1)]) for i in range(count)]
        with torch.autocast(x.device.type, enabled=False), buffers.using(ctx.buffers):
            backward = prologue_block.backward if ctx.spec.plan.prologue else _backward
            dx, grads = backward(grad, x, out, ctx.spec._replace(units=units), states, ctx.needs_input_grad)
        flat: list[Tensor | None] = []
        for unit, values in zip(units, grads, strict=True):
            for parameter, value in zip((unit.weight, unit.gamma, unit.beta), values, strict=True):
                flat.append(None if parameter is None or value is None else as_gradient(value, parameter))
        return dx, None, *flat


def _forward(x: Tensor, spec: Spec) -> tuple[Tensor, list[State], Plan]:
    """(out, one state per unit, the plan as it was carried out)."""
    (*first, last), projection = spec.split(spec.units)
    states: list[State] = []
    a = x
    for unit in first:
        a, state = _normalised(_conv(a, unit, spec.backend), unit, None, "relu", spec.backend)
        states.append(state)

    def run(a: Tensor, unit: Unit, gram: bool, residual: Tensor | None, activation: str | None) -> tuple[Any, bool]:
        if residual is not None:
            shape = conv_output_shape(a, unit.weight, unit.stride, unit.padding, unit.dilation)
            check_shape("residual_block", "the shortcut", residual, shape)
        result = _gram_forward(_sampled(a, unit), unit, residual, activation, spec.backend) if gram else None
        if result is not None:
            return result, True
        return _normalised(_conv(a, unit, spec.backend), unit, residual, activation, spec.backend), False

    plan = spec.plan
    shortcut, projected = x, []
    if projection is not None:
        (shortcut, state), gram = run(x, projection, plan.gram_projection, None, None)
        plan = plan._replace(gram_projection=gram)
        projected = [state]
    (out, state), gram = run(a, last, plan.gram, shortcut, "relu")
    return out, [*states, state, *projected], plan._replace(gram=gram)


def _backward(
    grad: Tensor, x: Tensor, out: Tensor, spec: Spec, states: list[State], needed: tuple[bool, ...]
) -> tuple[Tensor | None, list[Any]]:
    """(dx, [dW, dgamma, dbeta] of each unit); `needed` tells for x, the spec and each parameter what is asked for."""
    needs_x, needs_weight = needed[0], needed[2::3]
    main = len(spec.units) - spec.projected
    last = main - 1
    grads: list[Any] = [None] * len(spec.units)

    inputs = [x]  # what each unit of the main path reads
    for unit, i in zip(spec.units[:last], range(last), strict=True):
        states[i] = _with_output(states[i], unit, inputs[-1], spec.backend)
        inputs.append(_again(states[i], unit, None, "relu", spec.backend))

    def through_conv(
        dy: Tensor, a: Tensor, i: int, needs_input: bool, onto: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(the gradient of a, added to `onto`, which may be written over; the weight's)."""
        options = (*spec.units[i].geometry, needs_input, needs_weight[i])
        backend = conv_backend(spec.backend)
        return dispatch.call("conv_backward", dy, a, spec.units[i].weight, onto, *options, backend=backend)

    def through_unit(da: Tensor, i: int, activation: str | None, onto: Tensor | None = None) -> Tensor | None:
        a = inputs[i] if i < main else x
        state = _with_output(states[i], spec.units[i], a, spec.backend)
        dy, dgamma, dbeta, _ = _bn_backward(
            as_layout(da, state.y), None, spec.units[i], state, activation, False, spec.backend
        )
        previous, dweight = through_conv(dy, a, i, needs_x or 0 < i < main, onto)
        grads[i] = [dweight, dgamma, dbeta]
        return previous

    grad = as_layout(grad, out)
    unit = spec.units[last]
    da: Tensor | None
    s1 = None
    if spec.plan.gram:
        if _by_convs(grad, spec.backend):
            g, s1 = dispatch.call("masked_sums", grad, out, backend=conv_backend(spec.backend))
        else:
            g = dispatch.call("add_relu_backward", grad, out, backend=spec.backend)
        da, *grads[last] = _gram_backward(g, s1, _sampled(inputs[last], unit), unit, states[last], spec.backend)
        da = _spread(da, inputs[last], unit)
    else:
        state = _with_output(states[last], unit, inputs[last], spec.backend)
        dy, dgamma, dbeta, g = _bn_backward(grad, out, unit, state, "relu", True, spec.backend)
        da, dweight = through_conv(dy, inputs[last], last, True)
        grads[last] = [dweight, dgamma, dbeta]
    for i in reversed(range(last)):
        onto = g if i == 0 and not spec.projected else None  # the identity's gradient, of which nobody else knows
        da = through_unit(da, i, "relu", onto)  # type: ignore[arg-type]
    if last == 0 and not spec.projected and da is not None:
        da += g
    if spec.projected:
        unit = spec.units[main]
        if spec.plan.gram_projection:
            shortcut, *grads[main] = _gram_backward(g, s1, _sampled(x, unit), unit, states[main], spec.backend)
            if da is not None:
                da[:, :, :: unit.stride[0], :: unit.stride[1]] += shortcut
        else:
            da = through_unit(g, main, None, da)
    return da if needs_x else None, grads


def _with_output(state: State, unit: Unit, a: Tensor, backend: str) -> State:
    """The state with the unit's raw output, computed again where it was not kept."""
    return state if state.y is not None else state._replace(y=_conv(a, unit, backend))


def _bn_backward(
    grad: Tensor, out: Tensor | None, unit: Unit, state: State, activation: str | None, residual: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    known = (state.y, out, unit.gamma, unit.beta, state.mean, state.var)
    if unit.training and unit.group is not None:
        options = (state.count, unit.eps, activation, residual, unit.group, backend)
        return sync_bn_act_backward(grad, *known, *options)
    args = (*known, unit.eps, activation, unit.training, residual)
    return dispatch.call("bn_act_backward", grad, *args, backend=backend)


def _spread(da: Tensor, a: Tensor, unit: Unit) -> Tensor:
    """The gradient of all of `a` from that of the pixels that the unit read."""
    if unit.stride == (1, 1):
        return da
    full = torch.zeros_like(a)
    full[:, :, :: unit.stride[0], :: unit.stride[1]] = da
    return full
