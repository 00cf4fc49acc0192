"""A residual block whose convs read raw conv outputs: BN and ReLU are applied while loading, statistics while storing.

Every y_k is written once and read as it is; rectified activations and the gradients of raw outputs exist only inside
the kernels. Forward, with a_k = relu(bn_k(y_k)) formed on the way in:

    y1 = conv1(x)     y2 = conv2(a1)     each with its batch statistics
    Gram form:        out = relu(W3' a2 + Wd' x + shift + shortcut), one product, after the moments of a2 (and of x)
    stored output:    y3 = conv3(a2) with statistics, out = relu(bn3(y3) + shortcut)

Backward, g_k the gradient of bn_k(y_k) and dy_k = A (g_k - S1/M - xhat S2/M) formed on the way in:

    g_{k-1} = dgrad(dy_k) * (a_{k-1} > 0), with its sums S1 and S2      dW_k = wgrad(dy_k, a_{k-1})

A conv with groups is the library's: for it alone a_{k-1} and dy_k are tensors, formed and dropped around its calls.
Statistics and sums that are merged across processes (`Unit.group`) are exchanged between the kernels, in the order of
`residual_block`, so that a process whose batch is empty may take that form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet import dispatch
from fused_resnet.folding import accumulate_dtype
from fused_resnet.ops.block_units import (
    Plan,
    Spec,
    State,
    Unit,
    bn_scale,
    given_state,
    gram_folded,
    gram_gradients,
    gram_state,
)
from fused_resnet.ops.checks import as_layout, check_batch_statistics, check_shape, conv_output_shape
from fused_resnet.ops.sync_bn_act import local_statistics, mean_gradients, merge_statistics


def serves(x: Tensor) -> bool:
    """Whether a block can run this way: no kernel takes an empty tensor."""
    return bool(x.numel())


def _bn(unit: Unit, state: State) -> tuple[Any, ...]:
    return state.mean, state.var, unit.gamma, unit.beta, unit.eps


def _conv(x: Tensor, bn: Any, unit: Unit, backend: str) -> State:
    """The raw output of a unit, and the statistics that its BN takes of it or is given."""
    state = given_state(unit)
    if not unit.training:
        return _again(state, x, bn, unit, backend)
    shape = conv_output_shape(x, unit.weight, unit.stride, unit.padding, unit.dilation)
    check_batch_statistics(shape, unit.eps, unit.group is not None)
    running = (unit.running_mean, unit.running_var, unit.momentum)
    if unit.groups > 1:
        y = _grouped(x, bn, unit, backend)
        mean, var = local_statistics(y)
    else:
        own = running if unit.group is None else (None, None, 0.0)
        args = (bn, unit.weight, *unit.geometry[:3], True, *own)
        y, mean, var = dispatch.call("prologue_conv_forward", x, *args, backend=backend)
    if unit.groups > 1 or unit.group is not None:
        mean, var, count = merge_statistics(mean, var, y.numel() // y.shape[1], *running, unit.group)
        state = state._replace(count=count)
    return state._replace(y=y, mean=mean, var=var)


def _grouped(x: Tensor, bn: Any, unit: Unit, backend: str) -> Tensor:
    return torch.conv2d(_rectified(x, bn, backend), unit.weight, None, *unit.geometry)


def _rectified(x: Tensor, bn: Any, backend: str) -> Tensor:
    """relu(bn(x)), x without a BN."""
    if bn is None:
        return x
    mean, var, gamma, beta, eps = bn
    return dispatch.call("bn_act_eval_forward", x, gamma, beta, mean, var, None, eps, "relu", backend=backend)


def _again(state: State, x: Tensor, bn: Any, unit: Unit, backend: str) -> State:
    """The state with the unit's raw output, computed again where it was not kept."""
    if state.y is not None:
        return state
    if unit.groups > 1:
        return state._replace(y=_grouped(x, bn, unit, backend))
    args = (bn, unit.weight, *unit.geometry[:3], False, None, None, 0.0)
    return state._replace(y=dispatch.call("prologue_conv_forward", x, *args, backend=backend)[0])


def _gram(x: Tensor, bn: Any, unit: Unit, backend: str) -> State | None:
    """The state of a unit in Gram form, or None where it would lose digits."""
    if not unit.training:
        return given_state(unit)
    n, _, h, w = conv_output_shape(x, unit.weight, unit.stride, unit.padding, unit.dilation)
    check_batch_statistics((n, x.shape[1], h, w), unit.eps, unit.group is not None)
    mu, moments = dispatch.call("prologue_moments", x, bn, unit.stride, backend=backend)
    return gram_state(unit, mu, moments, n * h * w)


def forward(x: Tensor, spec: Spec) -> tuple[Tensor, list[State], Plan]:
    """(out, one state per unit, the plan as it was carried out)."""
    (*first, last), projection = spec.split(spec.units)
    backend, plan = spec.backend, spec.plan
    states: list[State] = []
    y, bn = x, None
    for unit in first:
        states.append(_conv(y, bn, unit, backend))
        y, bn = states[-1].y, _bn(unit, states[-1])

    projected, shortcut = None, x
    if projection is not None:
        projected = _gram(x, None, projection, backend) if plan.gram_projection else None
        plan = plan._replace(gram_projection=projected is not None)
        if projected is None:
            projected = _conv(x, None, projection, backend)
    end = _gram(y, bn, last, backend) if plan.gram else None
    folded: tuple[Tensor, Tensor] | None = None  # weight and shift of a projection that the end's product takes in
    if projection is not None and projected is not None:
        if projected.y is not None:
            shortcut = _apply(projected, projection, None, None, backend)
        else:
            folded = gram_folded(projection, projected)
            if end is None:
                shortcut = _end(x, None, projection, *folded, None, None, None, backend)
                folded = None
    if folded is None:
        shape = conv_output_shape(y, last.weight, last.stride, last.padding, last.dilation)
        check_shape("residual_block", "the shortcut", shortcut, shape)
    if end is None:
        end = _conv(y, bn, last, backend)
        out = _apply(end, last, shortcut, "relu", backend)
    else:
        weight, shift = gram_folded(last, end)
        if folded is None:
            out = _end(y, bn, last, weight, shift, shortcut, None, "relu", backend)
        else:
            out = _end(y, bn, last, weight, shift + folded[1], None, (x, folded[0], projection), "relu", backend)
    plan = plan._replace(gram=end.y is None)
    return out, [*states, end, *([] if projected is None else [projected])], plan


def _end(
    x: Tensor,
    bn: Any,
    unit: Unit,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    beside: tuple[Any, ...] | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    """act(conv(a) + shift + residual), where `beside` (x2, weight2, its unit) is given + conv2(x2)."""
    x2, weight2, unit2 = beside or (None, None, unit)
    args = (bn, weight, x2, weight2, shift, residual, unit.stride, unit2.stride, activation)
    return dispatch.call("prologue_end_forward", x, *args, backend=backend)


def _apply(state: State, unit: Unit, residual: Tensor | None, activation: str | None, backend: str) -> Tensor:
    args = (unit.gamma, unit.beta, state.mean, state.var, residual, unit.eps, activation)
    return dispatch.call("bn_act_eval_forward", state.y, *args, backend=backend)


def backward(
    grad: Tensor, x: Tensor, out: Tensor, spec: Spec, states: list[State], needed: tuple[bool, ...]
) -> tuple[Tensor | None, list[Any]]:
    """(dx, [dW, dgamma, dbeta] of each unit); `needed` tells for x, the spec and each parameter what is asked for."""
    needs_x, needs_weight = needed[0], needed[2::3]
    backend, units = spec.backend, spec.units
    last = len(units) - spec.projected - 1
    grads: list[Any] = [[None, None, None] for _ in units]

    inputs: list[tuple[Tensor, Any]] = [(x, None)]  # what each unit reads, and through which BN
    for i in range(last):
        states[i] = _again(states[i], *inputs[i], units[i], backend)
        inputs.append((states[i].y, _bn(units[i], states[i])))
    if spec.projected:
        inputs.append((x, None))

    def merged(sums: Any, i: int) -> Any:
        """The sums of unit i, which are its BN's gradients; as the kernels take them, whose count is this process's."""
        grads[i][1:] = sums
        unit, y = units[i], states[i].y
        if not unit.training:
            return None
        if unit.group is None:
            return sums
        mean_g, mean_gx = mean_gradients(sums[1], sums[0], states[i].count, unit.group)
        rows = y.numel() // y.shape[1]
        return mean_gx * rows, mean_g * rows

    def through_unit(g: Tensor, i: int, sums: Any, needs_input: bool, add: Tensor | None = None) -> Any:
        """(gradient of what the unit reads, its BN's sums); g is the gradient of the unit's own BN, `sums` `merged`."""
        unit, (a, bn) = units[i], inputs[i]
        if unit.groups > 1:
            mask = [needs_input, needs_weight[i], False]
            da, grads[i][0] = _grouped_gradients(g, states[i], sums, a, bn, unit, mask, backend)
            if da is None:
                return None, None
            if bn is None:
                return _added(da, add), None
            args = (_rectified(a, bn, backend), a, *bn[:2], bn[4])
            da, *previous = dispatch.call("bn_mask_backward", as_layout(da, a), *args, backend=backend)
            return da, previous
        known = (states[i].y, _bn(unit, states[i]), sums)
        if needs_weight[i]:
            options = (a, bn, tuple(unit.weight.shape[2:]), *unit.geometry[:3])
            grads[i][0] = dispatch.call("prologue_conv_grad_weight", g, *known, *options, backend=backend)
        if not needs_input:
            return None, None
        args = (*known, unit.weight, a, bn, add, *unit.geometry[:3])
        da, *previous = dispatch.call("prologue_conv_grad_input", g, *args, backend=backend)
        return da, previous

    def masked(grad: Tensor, out: Tensor | None, i: int) -> tuple[Tensor, Any]:
        states[i] = _again(states[i], *inputs[i], units[i], backend)
        args = (out, states[i].y, states[i].mean, states[i].var, units[i].eps)
        g, *sums = dispatch.call("bn_mask_backward", grad, *args, backend=backend)
        return g, sums

    def through_gram(g: Tensor, i: int) -> tuple[Tensor, Any]:
        unit, (a, bn) = units[i], inputs[i]
        q, s1 = dispatch.call("prologue_products", g, a, bn, unit.stride, backend=backend)
        found = gram_gradients(q, s1, g.numel() // g.shape[1], unit, states[i])
        grads[i] = [found.weight, found.gamma, found.beta]
        square = None if found.square is None else found.square.to(g.dtype)
        args = (found.scaled.to(g.dtype), a, bn, square, found.shift, unit.stride)
        da, *sums = dispatch.call("prologue_end_backward", g, *args, backend=backend)
        return da, sums

    grad = as_layout(grad, out)
    if spec.plan.gram:
        g = dispatch.call("add_relu_backward", grad, out, backend=backend)
        da, sums = through_gram(g, last)
    else:
        g, sums = masked(grad, out, last)
        da, sums = through_unit(g, last, merged(sums, last), True)
    shortcut: Tensor | None = g
    for i in reversed(range(last)):
        whole = merged(sums, i)
        if i == 0 and spec.projected:
            if spec.plan.gram_projection:
                shortcut, _ = through_gram(g, last + 1)
            else:
                _, own = masked(g, None, last + 1)
                shortcut, _ = through_unit(g, last + 1, merged(own, last + 1), needs_x)
        da, sums = through_unit(da, i, whole, needs_x or i > 0, shortcut if i == 0 else None)
    return da if needs_x else None, grads


def _grouped_gradients(
    g: Tensor, state: State, sums: Any, x: Tensor, bn: Any, unit: Unit, mask: list[bool], backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(da, dW) of bn(conv(a)), a = relu(bn(x)), by the library; `mask` says which of them are asked for."""
    if not any(mask):
        return None, None
    a = _rectified(x, bn, backend)
    dy = _raw_gradient(g, state, unit, sums, backend)
    weight, (stride, padding, dilation, groups) = unit.weight, unit.geometry
    found = torch.ops.aten.convolution_backward(
        dy, a, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    return found[0], found[1]


def _raw_gradient(g: Tensor, state: State, unit: Unit, sums: Any, backend: str) -> Tensor:
    """A (g - S1/M - xhat S2/M), the gradient of a unit's raw output from that of its BN, as a tensor."""
    y = state.y
    acc = accumulate_dtype(y.dtype)
    scale = bn_scale(unit, state.var.to(acc))
    scaled = torch.mul(g, scale.view(1, -1, 1, 1), out=torch.empty_like(y))
    if sums is None:
        return scaled
    grad_gamma, grad_beta = (-scale * s.to(acc) / (y.numel() // y.shape[1]) for s in sums)
    args = (grad_gamma, grad_beta, state.mean, state.var, scaled, unit.eps, None)
    return dispatch.call("bn_act_eval_forward", y, *args, backend=backend)


def _added(da: Tensor, add: Tensor | None) -> Tensor:
    """da + add, where `add` belongs to the pixels that a 1x1 conv of some stride reads."""
    if add is not None:
        steps = (-(-da.shape[2] // add.shape[2]), -(-da.shape[3] // add.shape[3]))
        da[:, :, :: steps[0], :: steps[1]] += add
    return da
