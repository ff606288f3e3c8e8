"""What each type of each matrix would cost the model: one pass forward and one back over some of the calibration text.

How far a change E of a weight matrix moves the next-token distribution is told by the gradient g of a loss at the
matrix's output y = W x, where the loss is that of tokens drawn from the model's own distribution: E[g gᵀ] is Fisher's
information, and KL ≈ ½ δyᵀ E[g gᵀ] δy to second order. Over T tokens, with errors of several outputs and tokens taken
for independent,

    KL of a token ≈ 1/2T Σ_t Σ_o g_to² (E x_t)_o²  ≈  1/2T Σ_o f_o (E H Eᵀ)_oo,    H = Σ_t w_t x_t x_tᵀ

with w_t = Σ_o g_to², the weight of a token, and f_o = Σ_t g_to² / Σ_t w_t, the share of an output. So nothing but the
measured error E of a type is needed, and KLs of matrices add up. How near that comes: docs/budgets.md.

The model is never in memory: layers are read one by one, forward and then backward, and computed again on the way back.
Tokens of even windows tell a method how to round (their Gram matrix), those of odd windows what it costs (H): a method
that compensates fits the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.models.feeds import Matrix
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import Decoder
from qtool.convert.models.tied import EMBEDDING, HEAD
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.capture import Calls, Hidden, run_layer
from qtool.quantize.methods.method import Method
from qtool.quantize.rounding import Factor, factorize
from qtool.quantize.source_model import SourceModel
from qtool.quantize.survey_head import Head

TOKENS = 8192  # of the calibration set, which a survey looks at
ROWS = 256  # of a matrix, evenly spaced, that are rounded to see what a type costs
TABLE = 4096  # of an embedding or a head: half of them those that count most, the others spaced over the rest
DAMP = 0.1
SEED = 0

Costs = dict[str, dict[str, float]]
"""Module -> type -> nats a token."""
Types = Mapping[str, Sequence[str]]
"""Module -> the types that it may get."""


@dataclass
class _Seen:
    """Of one matrix: ``gram`` of the windows that tell how to round, ``weighed`` H and ``outputs`` Σ_t g_to² of those
    that tell what it costs, ``tokens`` of the latter."""

    gram: Tensor
    weighed: Tensor
    outputs: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, out: int, columns: int, device: torch.device) -> _Seen:
        """Nothing yet."""
        gram, weighed = (torch.zeros(columns, columns, device=device) for _ in range(2))
        return cls(gram, weighed, torch.zeros(out, device=device))

    def add(self, inputs: Tensor, gradient: Tensor, parts: tuple[bool, bool]) -> None:
        """A window: ``inputs [tokens, in]``, ``gradient [tokens, out]`` of its loss; what it tells."""
        x, squares = inputs.float(), gradient.float().square()
        if parts[0]:
            self.gram += x.t() @ x
        if not parts[1]:
            return
        self.weighed += (x * squares.sum(1, keepdim=True)).t() @ x
        self.outputs += squares.sum(0)
        self.tokens += len(x)

    def cost(self, error: Tensor, rows: Tensor) -> float:
        """Nats a token of ``error [rows, in]`` in these rows, as a share of all."""
        share = self.outputs[rows] / self.outputs.sum().clamp_min(1e-30)
        lost = (share * ((error @ self.weighed) * error).sum(1)).sum()
        return max(0.0, float(lost)) * len(self.outputs) / len(rows) / (2 * self.tokens)


BY_HAND = "leave out `budget:` and say the types by hand (GGUF: `type:` or `mix:`; GPTQ: `bits:` and `modules:`)"


def require_measurable(shape: Geometry) -> None:
    """Raises QtoolError for a model whose costs no survey measures."""
    if shape.experts or shape.loops > 1:
        what = "a mixture of experts" if shape.experts else "a model whose layers run twice"
        raise QtoolError(f"budget: the costs of types are not measured yet for {what}: {BY_HAND}.")


@dataclass
class Survey:
    """``source``: of the model; ``method``: which rounds; ``types``: what each module may get; ``step`` is called for
    every layer, forward and back."""

    source: SourceModel
    method: Method
    types: Types
    step: Callable[[], None] = lambda: None
    _halves: bool = True
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def run(self, calibration: CalibrationSet) -> Costs:
        """Raises QtoolError for a model whose gradients are no numbers, and for one that has no such pass."""
        require_measurable(self.source.decoder.shape)
        windows = max(2, TOKENS // calibration.tokens.shape[1])
        text = CalibrationSet(calibration.tokens[:windows], calibration.origin)
        self._halves = len(text.tokens) > 1
        with torch.no_grad():
            hidden, calls = self.source.record(text)
            entered: list[Hidden] = []
            for index in range(len(self.source.layers)):
                entered.append([states.cpu() for states in hidden])
                layer = self._filled(index)
                for number, states in enumerate(hidden):
                    hidden[number] = run_layer(layer, states, calls)
                layer.to("meta")
                self.step()
        scale = self._embedded(text, entered[0][0])
        costs, gradients = self._head(hidden)
        for index in reversed(range(len(self.source.layers))):
            costs = self._back(index, entered.pop(), gradients, calls) | costs
            self.step()
        self._embedding(text, gradients, costs, scale)
        return {module: costs[module] for module in self.types}

    def _filled(self, index: int) -> nn.Module:
        layer = self.source.fill(index, self.source.place(index, self.source.read(index)))
        return layer.requires_grad_(False)

    def _head(self, hidden: Hidden) -> tuple[Costs, Hidden]:
        """(what the types of the head cost, the loss's gradients at the last layer's outputs)."""
        with torch.no_grad():
            head = Head(self.source)
        gradients, costs = [torch.zeros_like(states) for states in hidden], Costs()
        for states, gradient in zip(hidden, gradients, strict=True):
            for window in range(len(states)):
                leaf = states[window : window + 1].detach().requires_grad_()
                logits = head.logits(leaf).float()
                log = logits.detach().log_softmax(-1)[0]
                drawn = self._drawn(log.exp())
                loss = nn.functional.cross_entropy(logits[0], drawn, reduction="sum")
                (gradient[window : window + 1],) = torch.autograd.grad(loss, leaf)
                head.add(log.exp())
        if not all(bool(one.isfinite().all()) for one in gradients):
            raise QtoolError("budget: the gradients of the source model are NaN or Inf on the calibration text.")
        for module in (HEAD.removesuffix(".weight"), EMBEDDING.removesuffix(".weight")):
            if module in self.types and (module.startswith("lm_head") or head.tied):
                costs[module] = self._of_table(module, head.weight, head.counts, head.losses)
        head.close()
        return costs, gradients

    def _drawn(self, probabilities: Tensor) -> Tensor:
        """A token for each position ``[positions, vocabulary]``, from the distribution."""
        chance = torch.rand(len(probabilities), 1, generator=self._generator).to(probabilities.device)
        sums = probabilities.double().cumsum(-1)
        return torch.searchsorted(sums, chance * sums[:, -1:]).clamp_max(probabilities.shape[-1] - 1).squeeze(1)

    def _back(self, index: int, entered: Hidden, gradients: Hidden, calls: Calls) -> Costs:
        """One layer's types. ``entered``: its inputs; ``gradients``: of its outputs, then of its inputs."""
        layer, decoder = self._filled(index), self.source.decoder
        tensors = self.source.read(index)
        matrices = {matrix.module: matrix for matrix in decoder.matrices(index)}
        seen: dict[str, _Seen] = {}
        window = 0
        for number, states in enumerate(entered):
            leaf = states.to(gradients[number].device).detach().requires_grad_()
            met: dict[str, tuple[Tensor, Tensor]] = {}
            with _watching(layer, matrices, met):
                output = run_layer(layer, leaf, calls)
                wanted = [leaf, *(made for _, made in met.values())]
                found = torch.autograd.grad(output, wanted, gradients[number])
            gradients[number] = found[0]
            for module, one in zip(met, found[1:], strict=True):
                inputs = met[module][0]
                if module not in seen:
                    seen[module] = _Seen.of(one.shape[-1], inputs.shape[-1], inputs.device)
                for row in range(len(inputs)):
                    seen[module].add(inputs[row], one[row], self._parts(window + row))
            window += len(states)
        layer.to("meta")
        at = decoder.at(index)
        asked = {module: one for module, one in seen.items() if at + module in self.types}
        return {at + module: self._of_matrix(at, matrices[module], tensors, one) for module, one in asked.items()}

    def _parts(self, window: int) -> tuple[bool, bool]:
        """Whether a window tells how to round, and what that costs: the only one both."""
        return (window % 2 == 0, window % 2 == 1) if self._halves else (True, True)

    def _of_matrix(self, at: str, matrix: Matrix, tensors: Mapping[str, Tensor], seen: _Seen) -> dict[str, float]:
        factor = factorize(seen.gram, DAMP)
        weight = matrix.of(tensors[matrix.tensor]).to(seen.gram.device)
        return self._tried(at + matrix.module, weight, seen.cost, seen.gram, factor)

    def _tried(
        self, module: str, weight: Tensor, cost: Callable[[Tensor, Tensor], float], gram: Tensor, factor: Factor
    ) -> dict[str, float]:
        """Type -> nats a token, from some rows."""
        rows = _spaced(len(weight), ROWS).to(weight.device)
        some = weight[rows].contiguous()
        found = {}
        for kind in self.types[module]:
            error = self.method.trial(some, kind, gram, factor) - some.float()
            found[kind] = cost(error, rows)
        return found

    def _of_table(
        self, module: str, weight: Tensor, counts: Tensor, losses: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Type -> nats a token: what each row of ``weight`` loses by it, times how much the row counts ``[out]``."""
        rows, share = telling(counts)
        some = weight[rows].contiguous()
        return {
            kind: float((share * losses(self.method.trial(some, kind, None, None) - some.float())).sum())
            for kind in self.types[module]
        }

    def _embedded(self, text: CalibrationSet, hidden: Tensor) -> float:
        """What a model multiplies embedded rows by, most by 1. ``hidden``: what the first layer is fed of the first
        batch."""
        rows = self.source.checkpoint.tensor(EMBEDDING)[text.tokens[: len(hidden)]].float()
        return float((rows * hidden.float().cpu()).sum() / rows.square().sum().clamp_min(1e-30))

    def _embedding(self, text: CalibrationSet, gradients: Hidden, costs: Costs, scale: float) -> None:
        """Adds what errors of embedded rows cost: of a row the squared gradients of all its occurrences, spread over
        the channels as those of all rows are. ``scale``: as `_embedded`."""
        module = EMBEDDING.removesuffix(".weight")
        if module not in self.types:
            return
        weight = self.source.checkpoint.tensor(EMBEDDING).to(self.source.device)
        squares = torch.cat([one.float().square().flatten(0, 1) for one in gradients])
        tokens, each = text.tokens.flatten(), squares.sum(1).cpu()  # an accelerator adds in any order
        rows = torch.zeros(len(weight)).index_add_(0, tokens, each).to(squares.device)
        channels = squares.sum(0) / squares.sum().clamp_min(1e-30)

        def losses(error: Tensor) -> Tensor:
            return scale**2 * (error.square() @ channels) / (2 * len(tokens))

        own = self._of_table(module, weight, rows, losses)
        before = costs.get(module, {})
        costs[module] = {kind: before.get(kind, 0.0) + one for kind, one in own.items()}


def telling(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of a table that are looked at, how much each stands for). ``counts [out]``: what a row counts. Of many
    those that count most, and spaced over the others so many more, which stand for all of these alike."""
    if len(counts) <= TABLE:
        return torch.arange(len(counts), device=counts.device), counts
    order = torch.sort(counts, descending=True, stable=True).indices
    most, others = order[: TABLE // 2].sort().values, order[TABLE // 2 :].sort().values
    some = others[_spaced(len(others), TABLE // 2).to(counts.device)]
    alike = (counts[others].sum() / len(some)).expand(len(some))
    return torch.cat([most, some]), torch.cat([counts[most], alike])


@contextmanager
def _watching(layer: nn.Module, modules: Iterable[str], met: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While open, ``met`` gets module -> (input, output) of every matrix of a forward."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            met[name] = inputs[0].detach(), output

        return keep

    hooks = [layer.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def survey_bytes(decoder: Decoder, shapes: Mapping[str, tuple[int, ...]], length: int, width: int) -> tuple[int, int]:
    """(on the computing device, in host memory besides) while types are measured, windows being ``length`` tokens:
    the inputs of every layer on the host; on the device the hidden states and their gradients, a layer, the two sums
    of each of its matrices with one's factor, or the head with a window's chances. ``width``: of a number computed
    with."""
    geometry, tokens = decoder.shape, max(2, TOKENS // length) * length
    states = tokens * geometry.hidden * width
    layer = max(range(geometry.layers), key=lambda one: sum(_count(shapes, decoder.at(one))))
    matrices = [matrix.shape(shapes[decoder.at(layer) + matrix.tensor]) for matrix in decoder.matrices(layer)]
    sums = sum(8 * columns**2 for _, columns in matrices) + 12 * max(columns for _, columns in matrices) ** 2
    weights = sum(_count(shapes, decoder.at(layer)))
    activations = TOKENS * sum(out for out, _ in matrices) * width * 3
    head = geometry.vocab * (geometry.hidden * (width + 4) + length * 24)
    return 2 * states + max(weights * (width + 4) + sums + activations, head), states * geometry.layers


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Iterator[int]:
    return (math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def _spaced(count: int, most: int) -> Tensor:
    """At most ``most`` whole numbers below ``count``, evenly."""
    return torch.arange(count) if count <= most else (torch.arange(most) * count) // most
