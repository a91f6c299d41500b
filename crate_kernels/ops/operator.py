"""How a public function calls its implementation; the same for every operator.

A call takes one of three routes:

- Outside tracing the implementation is called directly: through one ``torch.autograd.Function`` if a gradient is
  needed, else as a plain function. Arguments are checked and a backend is chosen once per kind of call. The result, a
  :class:`Plan`, is cached by the metadata of the tensors and by the options.
- While torch records the call (``torch.compile``, export, fake tensors, dispatch modes, tensor subclasses), it goes
  through the operator ``crate::<name>``, which is registered with ``torch.library``. Transforms (``torch.func``,
  forward-mode derivatives) take the reference equations.
- In an export that requests no backend it becomes standard ATen operators (``standard.py``), which run without this
  package.

The first two run the same ``forward`` and ``backward`` of the implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks, standard
from .kept import kept

MOST_PLANS = 512
"""Largest number of cached plans per operator. A full cache is emptied."""

PLAIN = (Tensor, torch.nn.Parameter)
"""The tensor types of the direct route. Any other subclass of Tensor may override operators."""


def traced() -> bool:
    """Whether torch records or transforms calls, so that operators must go through its dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether the call is inside ``torch.func`` (``grad``, ``vmap``, ``jvp``) or a forward-mode derivative.

    torch can transform its own operations, but not an operator that is registered only with a backward.
    """
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


class Plan:
    """The prepared form of one kind of call: checked numbers, backend, and the functions of the backend."""

    __slots__ = (
        "autocast", "backend", "backward", "backward_scalars", "direct", "dtype", "forward", "operator",
        "scalars",
    )  # fmt: skip

    operator: Operator
    backend: str
    forward: Callable
    backward: Callable | None
    scalars: tuple
    backward_scalars: tuple
    dtype: torch.dtype | None
    """The dtype of the products if autocast changes it."""
    autocast: str | None
    """The device type for which autocast was on."""
    direct: bool
    """Whether the call may take the direct route."""


class Operator:
    """One operator: its registration with ``torch.library``, its direct route, and its choice of a backend.

    Args:
        package: the operator's folder, ``__package__`` of its ``op.py``; the operator is named like it.
        arguments: schema of the arguments without the last one, ``str backend``: tensors first, then numbers.
        outputs: names of what an implementation's ``forward`` returns; the first is the operator's result.
        saves: the outputs that ``backward`` takes, after the gradient of the result and all tensors of ``arguments``.
        passes: the numbers of ``arguments`` that ``backward`` takes after the tensors.
        constants: tensor arguments that have no gradient.
        casts: tensor arguments that autocast casts. If the first one is not among them, it is the stream of a layer,
            which keeps its dtype: every implementation takes a float32 stream beside narrower matrices.
        sizes: the tensors -> ``(size, rows)``, by which the measured order of the backends is looked up.
        fake: what ``forward`` returns, as empty tensors.
        keys: which tensor contains the tokens that ``lengths`` counts.
        optional: whether ``forward`` has a last argument ``save``. False means that no gradient will be needed.
    """

    def __init__(
        self,
        package: str,
        arguments: str,
        *,
        outputs: Sequence[str],
        saves: Sequence[str],
        passes: Sequence[str],
        constants: Sequence[str] = (),
        casts: Sequence[str],
        sizes: Callable[..., tuple[int, int]],
        fake: Callable[..., Any],
        optional: bool = False,
        keys: int = 0,
    ):
        self.name = package.rpartition(".")[2]
        self.implementations: dict[str, Any] = backends.implementations(package)
        fields = [field.split() for field in arguments.split(",")]
        self._tensor_names = [name for kind, name in fields if kind.startswith("Tensor")]
        self._scalar_names = [name for kind, name in fields if not kind.startswith("Tensor")]
        self._differentiable = [i for i, name in enumerate(self._tensor_names) if name not in constants]
        self._casts = [i for i, name in enumerate(self._tensor_names) if name in casts]
        self._folded = self._tensor_names.index("folded") if "folded" in self._tensor_names else None
        self._lengths = self._tensor_names.index("lengths") if "lengths" in self._tensor_names else None
        self._passes = [self._scalar_names.index(name) for name in passes]
        self._saves = [outputs.index(name) for name in saves]
        self._single = len(outputs) == 1
        self._sizes = sizes
        self._optional = optional
        self._keys = keys
        self._plans: dict[tuple, Plan] = {}
        self._register(fields, outputs, saves, passes, fake)
        self._function: Any = type("Crate" + self.name.title().replace("_", ""), (_Direct,), {})

    # -- calls -------------------------------------------------------------------------------------------------------

    def __call__(self, check: Callable[..., tuple], backend: str | None, tensors: tuple, options: tuple) -> Tensor:
        """Run the operator on ``tensors`` (in the schema's order; None for an absent one) with ``options``.

        ``check(*tensors, *options)`` looks at metadata alone. It raises an error for an argument that does not fit, and
        returns the numbers of the schema.
        """
        if traced():
            return self._dispatched(check, backend, tensors, options)
        key: tuple | None
        plan: Plan | None
        try:
            autocast = _autocast(tensors[0].device.type) if torch._C._is_any_autocast_enabled() else None
            key = (
                backend, backends.requested_backend(), autocast, options, *map(type, options),  # 1 == True
                *[t if t is None else (type(t), t.dtype, t.layout, t.device, t.shape) for t in tensors],
            )  # fmt: skip
            plan = self._plans.get(key)
        except (AttributeError, TypeError, RuntimeError):  # not a tensor, or not hashable: the check names the argument
            key = plan = None
        if plan is None:
            plan = self._plan(check, backend, tensors, options)
            if key is not None:
                if len(self._plans) >= MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        if not plan.direct:
            return self._dispatched(check, backend, tensors, options)
        if self._lengths is not None and tensors[self._lengths] is not None:
            checks.length_values(tensors[self._lengths], tensors[self._keys].shape[1])
        if plan.backward is None:
            return plan.forward(*tensors, *plan.scalars)
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return self._function.apply(plan, *tensors)
        # Weights beside a folded dictionary are prepared for inference. They persist, so their casts can be cached.
        stay = self._folded is not None and tensors[self._folded] is not None
        out = self._forward(plan, self._cast(tensors, plan.dtype, stay), False)
        return out if self._single else out[0]

    def forget(self) -> None:
        """Empty the cache of plans, so that the next call of each kind chooses its backend again."""
        self._plans.clear()

    def _dispatched(self, check: Callable[..., tuple], backend: str | None, tensors: tuple, options: tuple) -> Tensor:
        """Call the registered operator. An export that requests no backend gets standard operators."""
        scalars = check(*tensors, *options)
        if standard.exporting() and backend is None and backends.requested_backend() is None:
            if self._lengths is not None:
                checks.length_values(tensors[self._lengths], tensors[self._keys].shape[1])
            return getattr(standard, self.name)(*tensors, *scalars)
        dtype = backends.autocast_dtype(tensors[0])
        cast = self._cast(tensors, dtype)
        name = self._choose(backend, cast, scalars)
        if name != "reference" and transformed():
            if backend is not None or backends.requested_backend() is not None:
                raise backends.CannotRun(
                    name,
                    "torch.func and forward-mode derivatives transform the reference equations; "
                    "request the backend 'reference', or none",
                )
            name = "reference"
        if name == "reference":
            if self._lengths is not None:
                checks.length_values(tensors[self._lengths], tensors[self._keys].shape[1])
            return self.reference(*tensors, *scalars)
        out = self._registered(*cast, *scalars, name)
        return out if self._single else out[0]

    def reference(self, *arguments) -> Tensor:
        """The reference equations, differentiated by torch itself instead of the gradient of the kernels."""
        return getattr(self.implementations["reference"], self.name)(*arguments)

    # -- plans -------------------------------------------------------------------------------------------------------

    def _plan(self, check: Callable[..., tuple], backend: str | None, tensors: tuple, options: tuple) -> Plan:
        plan = Plan()
        plan.operator = self
        plan.scalars = check(*tensors, *options)
        plan.backward_scalars = tuple(plan.scalars[i] for i in self._passes)
        on = backends.autocast_is_on(tensors[0])
        plan.autocast = tensors[0].device.type if on else None
        dtype = backends.autocast_dtype(tensors[0])
        plan.dtype = dtype if on else None
        plan.backend = self._choose(backend, self._cast(tensors, dtype), plan.scalars)
        if plan.backend == "reference":
            plan.forward, plan.backward = self.reference, None
        else:
            implementation = self.implementations[plan.backend]
            plan.forward, plan.backward = implementation.forward, implementation.backward
        # Tensors on the meta device have no data for a kernel.
        plan.direct = tensors[0].device.type != "meta" and all(t is None or type(t) in PLAIN for t in tensors)
        return plan

    def _choose(self, backend: str | None, tensors: Sequence[Tensor | None], scalars: tuple) -> str:
        size, rows = self._sizes(*tensors)
        causal = "causal" in self._scalar_names and scalars[self._scalar_names.index("causal")]
        return backends.resolve(
            self.implementations, backend, *tensors, *scalars, size=size, rows=rows, causal=bool(causal)
        )

    def _cast(
        self, tensors: Sequence[Tensor | None], dtype: torch.dtype | None, stay: bool = False
    ) -> Sequence[Tensor | None]:
        """The tensors in autocast's dtype. With ``stay``, casts of weights are cached between calls."""
        if dtype is None:
            return tensors
        cast: list[Any] = list(tensors)
        for i in self._casts:
            if cast[i] is None or cast[i].dtype == dtype:
                continue
            found = kept(cast[i], ("cast", dtype), partial(cast[i].to, dtype)) if stay and i else None
            cast[i] = cast[i].to(dtype) if found is None else found
        return cast

    def _forward(self, plan: Plan, tensors: Sequence[Tensor | None], save: bool):
        arguments = (*tensors, *plan.scalars, save) if self._optional else (*tensors, *plan.scalars)
        if plan.autocast is None:
            return plan.forward(*arguments)
        return backends.without_autocast(plan.autocast, plan.forward, *arguments)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _gradients(self, gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for every tensor argument: None for constants and for absent tensors."""
        found: list[Tensor | None] = [None] * len(self._tensor_names)
        for i, gradient in zip(self._differentiable, gradients, strict=True):
            found[i] = None if tensors[i] is None else gradient
        return found

    def _differentiable_backward(
        self, grad: Tensor, tensors: Sequence[Tensor | None], scalars: tuple, autocast: str | None, dtype
    ) -> list[Tensor | None]:
        """Gradients that can be differentiated again, from the reference equations."""
        with torch.enable_grad():
            # Each tensor is replaced by a view. Otherwise a gradient would also flow through arguments that depend on
            # it.
            named: list[Any] = [t if t is None else t.view_as(t) for t in tensors]
            if autocast is None:
                out = self.reference(*named, *scalars)
            else:
                with torch.autocast(autocast, dtype):
                    out = self.reference(*named, *scalars)
            wanted = [i for i in self._differentiable if named[i] is not None and named[i].requires_grad]
            gradients = torch.autograd.grad(out, [named[i] for i in wanted], grad, create_graph=True)
        found: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(wanted, gradients, strict=True):
            found[i] = gradient
        return found

    # -- registration ------------------------------------------------------------------------------------------------

    def _register(self, fields, outputs, saves, passes, fake) -> None:
        tensors, scalars = len(self._tensor_names), len(self._scalar_names)
        kinds = [" ".join(field) for field in fields]
        results = "Tensor" if self._single else f"({', '.join(['Tensor'] * len(outputs))})"
        gradients = f"({', '.join(['Tensor'] * len(self._differentiable))})"
        numbers = [kinds[tensors + i] for i in self._passes]
        schema = f"({', '.join([*kinds, 'str backend'])}) -> {results}"
        given = ["Tensor grad", *kinds[:tensors], *(f"Tensor saved_{name}" for name in saves), *numbers, "str backend"]

        def forward(*given):
            *arguments, backend = given
            if self._lengths is not None:
                checks.length_values(arguments[self._lengths], arguments[self._keys].shape[1])
            if self._optional:
                arguments.append(True)
            return backends.run(self.implementations[backend].forward, *arguments)

        def fake_forward(*arguments):
            return fake(*arguments[:-1])

        def backward(*given):
            *arguments, backend = given
            found = backends.run(self.implementations[backend].backward, *arguments)
            # A schema cannot return an absent tensor, so an empty one represents it.
            return tuple(arguments[0].new_empty(0) if g is None else g for g in found)

        def fake_backward(grad, *arguments):
            return tuple(
                grad.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
                for t in (arguments[i] for i in self._differentiable)
            )

        def setup_context(ctx, inputs, output):
            result = (output,) if self._single else output
            ctx.scalars, ctx.backend = inputs[tensors : tensors + scalars], inputs[-1]
            ctx.mark_non_differentiable(*result[1:])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:tensors], *(result[i] for i in self._saves))

        def gradient(ctx, grad: Tensor | None, *_):
            if grad is None:
                return (None,) * (len(fields) + 1)
            saved = ctx.saved_tensors  # read once: under activation checkpointing each read would run the layer again
            given = saved[:tensors]
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                found = self._differentiable_backward(grad, given, ctx.scalars, None, None)
            else:
                numbers = [ctx.scalars[i] for i in self._passes]
                found = self._gradients(self._registered_backward(grad, *saved, *numbers, ctx.backend), given)
            return *found, *(None,) * (scalars + 1)

        library = torch.library
        operator = library.custom_op(f"crate::{self.name}", forward, mutates_args=(), schema=schema)
        operator.register_fake(fake_forward)
        inverse = library.custom_op(
            f"crate::{self.name}_backward", backward, mutates_args=(), schema=f"({', '.join(given)}) -> {gradients}"
        )
        inverse.register_fake(fake_backward)
        operator.register_autograd(gradient, setup_context=setup_context)
        self._registered = getattr(torch.ops.crate, self.name).default
        self._registered_backward = getattr(torch.ops.crate, f"{self.name}_backward").default


class _Direct(torch.autograd.Function):
    """The node of an operator in the autograd graph on the direct route."""

    @staticmethod
    def forward(ctx, plan: Plan, *tensors):
        operator = plan.operator
        cast = operator._cast(tensors, plan.dtype)
        out = operator._forward(plan, cast, True)
        outputs = (out,) if operator._single else out
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        # The backward casts the weights again, because saving a second copy would cost more memory than a cast costs
        # time.
        ctx.save_for_backward(*tensors, *[outputs[i] for i in operator._saves])
        return outputs[0]

    @staticmethod
    def backward(ctx, grad):
        plan = ctx.plan
        operator = plan.operator
        tensors = len(operator._tensor_names)
        if grad is None:
            return (None,) * (tensors + 1)
        saved = ctx.saved_tensors  # read once: under activation checkpointing each read would run the layer again
        given, results = saved[:tensors], saved[tensors:]
        if torch.is_grad_enabled():
            return None, *operator._differentiable_backward(grad, given, plan.scalars, plan.autocast, plan.dtype)
        cast = operator._cast(given, plan.dtype)
        if traced():  # compiled autograd
            found = operator._registered_backward(grad, *cast, *results, *plan.backward_scalars, plan.backend)
        else:
            found = backends.run(plan.backward, grad, *cast, *results, *plan.backward_scalars)
        return None, *operator._gradients(found, given)


def _autocast(device: str) -> torch.dtype | None:
    """Autocast's dtype for a device type; None where autocast is off."""
    on = device in backends.AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None
