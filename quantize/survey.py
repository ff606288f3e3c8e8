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

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.tied import EMBEDDING, HEAD
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.capture import Calls, Hidden, run_layer
from qtool.quantize.methods.method import Method
from qtool.quantize.source_model import SourceModel
from qtool.quantize.survey_errors import Costs, Problem, costs_of, layers_at_once, problems_of, spaced
from qtool.quantize.survey_head import Head
from qtool.quantize.survey_memory import TOKENS, largest, sums_bytes

TABLE = 4096  # rows of an embedding or a head: half of them those that count most, the others spaced over the rest
AHEAD = {"cuda": 3, "cpu": 1}  # layers that are read while one is computed
SEED = 0

Types = Mapping[str, Sequence[str]]
"""Module -> the types that it may get."""


@dataclass(frozen=True)
class Begun:
    """A survey on its way back, that can go on: ``layer``: the first whose matrices are measured; ``gradients``: of the
    loss at its inputs."""

    layer: int
    costs: Costs
    gradients: Hidden


BY_HAND = "leave out `budget:` and say types by hand (`ignore:`; GGUF: `type:` or `mix:`; GPTQ: `bits:` and `modules:`)"


def require_measurable(shape: Geometry) -> None:
    """Raises QtoolError for a model whose costs no survey measures."""
    if shape.experts or shape.loops > 1:
        what = "a mixture of experts" if shape.experts else "a model whose layers run twice"
        raise QtoolError(f"budget: the costs of types are not measured yet for {what}: {BY_HAND}.")


@dataclass
class Survey:
    """``source``: of the model; ``method``: which rounds; ``types``: what each module may get; ``step`` is called for
    every layer, forward and back; ``keep`` with what can be gone on from; ``ready`` before a type is rounded to."""

    source: SourceModel
    method: Method
    types: Types
    step: Callable[[], None] = lambda: None
    keep: Callable[[Begun], None] = lambda _: None
    ready: Callable[[str], None] = lambda _: None
    _halves: bool = True
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def run(self, calibration: CalibrationSet, begun: Begun | None = None) -> Costs:
        """``begun``: what an earlier one, which did not end, gave to ``keep``. Raises QtoolError for a model whose
        gradients are no numbers, and for one that has no such pass."""
        require_measurable(self.source.decoder.shape)
        windows = max(2, TOKENS // calibration.tokens.shape[1])
        text = CalibrationSet(calibration.tokens[:windows], calibration.origin)
        self._halves = len(text.tokens) > 1
        left = len(self.source.layers) if begun is None else begun.layer
        entered: list[Hidden] = []
        with torch.no_grad():
            hidden, calls = self.source.record(text)
            scale = self._embedded(text, hidden[0])
            for index, tensors in self._layers(range(left)):
                entered.append([states.cpu() for states in hidden])
                layer = self._filled(index, tensors)
                for number, states in enumerate(hidden):
                    hidden[number] = run_layer(layer, states, calls)
                layer.to("meta")
                self.step()
        if begun is None:
            costs, gradients = self._head(hidden)
        else:
            costs, gradients = dict(begun.costs), [one.to(self.source.device) for one in begun.gradients]
        del hidden
        waiting: list[Problem] = []
        at_once, met = self._at_once(), 0
        for index, tensors in self._layers(reversed(range(left))):
            waiting += self._back(index, tensors, entered.pop(), gradients, calls)
            met += 1
            if met == at_once or index == 0:
                costs = costs_of(waiting, self.method, self.ready) | costs
                waiting, met = [], 0
                self.keep(Begun(index, costs, gradients))
            self.step()
        self._embedding(text, gradients, costs, scale)
        return {module: costs[module] for module in self.types}

    def _at_once(self) -> int:
        decoder = self.source.decoder
        shapes = {name: info.shape for name, info in self.source.checkpoint.tensors.items()}
        return layers_at_once(self.source.device, sums_bytes(decoder, shapes, largest(decoder, shapes)))

    def _layers(self, order: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Layers' tensors, some read ahead."""
        ahead = AHEAD[self.source.device.type]
        with ThreadPoolExecutor(max_workers=ahead) as readers:
            coming: deque[tuple[int, Future[dict[str, Tensor]]]] = deque()
            for index in order:
                coming.append((index, readers.submit(self.source.read, index)))
                if len(coming) > ahead:
                    number, read = coming.popleft()
                    yield number, read.result()
            while coming:
                number, read = coming.popleft()
                yield number, read.result()

    def _filled(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        layer = self.source.fill(index, self.source.place(index, tensors))
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

    def _back(
        self, index: int, tensors: Mapping[str, Tensor], entered: Hidden, gradients: Hidden, calls: Calls
    ) -> list[Problem]:
        """One layer's problems. ``entered``: its inputs; ``gradients``: of its outputs, then of its inputs."""
        layer, decoder, window = self._filled(index, tensors), self.source.decoder, 0
        at, matrices = decoder.at(index), decoder.matrices(index)
        problems = problems_of(
            [feed.consumers for feed in decoder.feeds(index)], lambda one: one.of(tensors[one.tensor]), at, self.types,
            self.source.device, self.method.compensates,
        )  # fmt: skip
        for number, states in enumerate(entered):
            leaf = states.to(gradients[number].device).detach().requires_grad_()
            met: dict[str, tuple[Tensor, Tensor]] = {}
            with _watching(layer, [matrix.module for matrix in matrices], met):
                output = run_layer(layer, leaf, calls)
                wanted = [leaf, *(made for _, made in met.values())]
                found = torch.autograd.grad(output, wanted, gradients[number])
            gradients[number] = found[0]
            given = {at + module: (met[module][0], one) for module, one in zip(met, found[1:], strict=True)}
            for row in range(len(states)):
                rounds, costs = self._parts(window + row)
                for problem in problems:
                    if rounds:
                        problem.add(given[problem.members[0].module][0][row])
                    for member in problem.members if costs else ():
                        member.add(*(one[row] for one in given[member.module]))
            window += len(states)
        layer.to("meta")
        return problems

    def _parts(self, window: int) -> tuple[bool, bool]:
        """Whether a window tells how to round, and what that costs: the only one both."""
        return (window % 2 == 0, window % 2 == 1) if self._halves else (True, True)

    def _of_table(
        self, module: str, weight: Tensor, counts: Tensor, losses: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Type -> nats a token: what each row of ``weight`` loses by it, times how much the row counts ``[out]``."""
        rows, share = telling(counts)
        some, found = weight[rows].contiguous(), {}
        for kind in self.types[module]:
            self.ready(kind)
            found[kind] = float((share * losses(self.method.trial(some, kind, None, None) - some.float())).sum())
        return found

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
    some = others[spaced(len(others), TABLE // 2).to(counts.device)]
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
